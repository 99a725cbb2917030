"""From `data.*` settings to the parts of `.bin/.idx` files that are trained on, validated on and tested on."""

import hashlib
import json
import shlex
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid.config import DataConfig
from hybrid.data.corpus import SPLITS, normalized
from hybrid.data.indexed import Index, read_index
from hybrid.data.prepare import prepare_corpus
from hybrid.data.tokenizer import Tokenizer
from hybrid.errors import ConfigError, Problem

# How much of the tokens is read to see whether they fit the embedding.
_LOOKED_THROUGH_BYTES = 1 << 26


@dataclass(frozen=True)
class Part:
    """Some documents of an indexed file: the share of it (from, to), their tokens, where those begin in `.bin`.

    `weight` is the part's in a blend; `place` names the setting that the part came from.
    """

    name: str
    prefix: str
    share: tuple[float, float]
    dtype: np.dtype
    offset_bytes: int
    tokens: int
    weight: float
    place: str

    def read(self) -> NDArray:
        """Return the tokens of these documents, (tokens,), as a memory map."""
        return np.memmap(f"{self.prefix}.bin", self.dtype, "r", offset=self.offset_bytes, shape=(self.tokens,))


@dataclass
class Sources:
    """The parts of each split, and a digest that changes when tokens or weights do."""

    train: list[Part]
    validation: list[Part] = field(default_factory=list)
    test: list[Part] = field(default_factory=list)
    fingerprint: str = ""


def find_sources(data: DataConfig, tokenizer: Tokenizer, rows: int) -> Sources:
    """Return what `data` names, prepared first where it is text; `rows` is the number of rows of the embedding.

    Raises ConfigError for data that is missing, damaged, too small for one sample, or has tokens without a row.
    """
    if data.source == "indexed":
        return _indexed(data, tokenizer, rows)
    corpus = prepare_corpus(data, tokenizer)
    parts: dict[str, list[Part]] = {split: [] for split in SPLITS}
    for split in corpus.parts:
        prefix = str(corpus.folder / split)
        parts[split] = [_part(split, prefix, read_index(prefix, "data.cache"), (0.0, 1.0), 1.0, "data.path")]
    sources = Sources(parts["train"], parts["validation"], parts["test"], corpus.sha256)
    check_sizes(sources, data.sequence_length)
    return sources


def parse_blend(text: str, place: str) -> list[tuple[float | None, str]]:
    """Return (weight, prefix) of "PREFIX", "PREFIX PREFIX ..." or "WEIGHT PREFIX WEIGHT PREFIX ..." (Megatron's form).

    Weights are None where none are given; a prefix with spaces stands in quotation marks. Raises ConfigError for a
    mixture of both or a weight that is not positive.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(Problem(place, f"'{text}' opens a quotation mark and does not close it")) from error
    weights = [_number(word) for word in words[::2]]
    if not any(weight is not None for weight in weights):
        return [(None, word) for word in words]
    problem = Problem(place, f"'{text}' is neither prefixes nor pairs of a weight above 0 and a prefix")
    if len(words) % 2 or any(weight is None or not 0 < weight < float("inf") for weight in weights):
        raise ConfigError(problem)
    return list(zip(weights, words[1::2], strict=True))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _indexed(data: DataConfig, tokenizer: Tokenizer, rows: int) -> Sources:
    problems: list[Problem] = []
    if not data.path:
        raise ConfigError(Problem("data.path", "data.source=indexed needs the path of .bin/.idx files without suffix"))
    separate = data.validation_path is not None or data.test_path is not None
    if separate:
        given = {"train": data.path, "validation": data.validation_path, "test": data.test_path}
        shares = {split: (0.0, 1.0) for split, path in given.items() if path}
    else:
        given: dict[str, str | None] = dict.fromkeys(SPLITS, data.path)
        edges = list(accumulate(normalized(data.split), initial=0.0))
        shares = {s: (edges[i], edges[i + 1]) for i, s in enumerate(SPLITS) if edges[i] < edges[i + 1]}
    parts: dict[str, list[Part]] = {split: [] for split in SPLITS}
    indices: dict[str, Index] = {}
    for split, share in shares.items():
        place = f"data.{split}_path" if separate and split != "train" else "data.path"
        try:
            blend = parse_blend(given[split] or "", place)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        names = _names([prefix for _, prefix in blend])
        for (weight, prefix), name in zip(blend, names, strict=True):
            try:
                if prefix not in indices:
                    indices[prefix] = read_index(prefix, place)
                    _check_tokenizer(prefix, tokenizer)
                    _check_tokens(prefix, indices[prefix], rows, place)
                part = _part(name, prefix, indices[prefix], share, weight, place)
                if part.tokens:
                    parts[split].append(part)
                elif split == "train":
                    problems.append(Problem("data.split", f"gives no document of '{prefix}' to training"))
            except ConfigError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        if split != "train" and not parts[split] and not problems:
            held = sum(len(index.lengths) for index in indices.values())
            message = f"the share for {split} is less than one of the {held} documents: raise it, or set it to 0"
            problems.append(Problem("data.split", message))
    if problems:
        raise ConfigError(problems)
    sources = Sources(parts["train"], parts["validation"], parts["test"], _fingerprint(parts["train"]))
    check_sizes(sources, data.sequence_length)
    return sources


def _part(name: str, prefix: str, index: Index, share: tuple[float, float], weight: float | None, place: str) -> Part:
    # The same rounding as megatron-core's, so that both see the same split.
    first, last = (round(edge * len(index.lengths)) for edge in share)
    before = int(index.lengths[:first].sum(dtype=np.int64))
    tokens = int(index.lengths[first:last].sum(dtype=np.int64))
    weight = float(tokens) if weight is None else weight
    return Part(name, prefix, share, index.dtype, before * index.dtype.itemsize, tokens, weight, place)


def _names(prefixes: list[str]) -> list[str]:
    """Short names for the sets: the last part of the path where that is unambiguous."""
    short = [Path(prefix).name.removesuffix("_text_document") for prefix in prefixes]
    counts = Counter(short)
    return [name if counts[name] == 1 else prefix for name, prefix in zip(short, prefixes, strict=True)]


def check_sizes(sources: Sources, sequence_length: int) -> None:
    """Raise ConfigError when a training part has no whole sample or a held-out part not one label."""
    problems = []
    for part in sources.train:
        if part.tokens <= sequence_length:
            message = f"'{part.prefix}' has {part.tokens:,} training tokens; one sample takes {sequence_length:,} + 1"
            problems.append(Problem("data.sequence_length", message))
    for part in [*sources.validation, *sources.test]:
        if part.tokens < 2:
            message = f"'{part.prefix}' has a single token to hold out: nothing to predict"
            problems.append(Problem(part.place, message))
    if problems:
        raise ConfigError(problems)


def _check_tokenizer(prefix: str, tokenizer: Tokenizer) -> None:
    """Raise ConfigError when `hybrid data prepare` noted another tokenizer beside the files."""
    try:
        theirs = json.loads(Path(f"{prefix}.json").read_text())["tokenizer"]
        ours = tokenizer.unique_identifiers
        # The same file may have been read in two ways (a folder, its tokenizer.json): then only numbers are compared.
        same = theirs == ours or (
            theirs["kind"] != ours["kind"] and all(theirs[name] == ours[name] for name in ("vocab_size", "eod"))
        )
    except (OSError, ValueError, KeyError, TypeError):
        return  # made by Megatron's tool, which notes nothing
    if not same:
        message = f"'{tokenizer.spec}' is not the tokenizer that '{prefix}' was made with ({theirs})"
        raise ConfigError(Problem("data.tokenizer", message))


def _check_tokens(prefix: str, index: Index, rows: int, place: str) -> None:
    count = min(index.tokens, _LOOKED_THROUGH_BYTES // index.dtype.itemsize)
    tokens = np.memmap(f"{prefix}.bin", index.dtype, "r", shape=(count,))
    if index.dtype.kind == "f" or tokens.min() < 0 or tokens.max() >= rows:
        found = "numbers that are not token ids" if index.dtype.kind == "f" else f"token {tokens.max()}"
        message = f"'{prefix}' holds {found}, but the embedding has {rows} rows: it was made with another tokenizer"
        raise ConfigError(Problem(place, message))


def _fingerprint(parts: list[Part]) -> str:
    """A digest of sizes, weights, and the ends of the token files: reading those whole would take too long."""
    digest = hashlib.sha256()
    for part in parts:
        tokens = part.read()
        digest.update(f"{part.share} {part.tokens} {part.weight}".encode())
        digest.update(tokens[: 1 << 19].tobytes())
        digest.update(tokens[-(1 << 19) :].tobytes())
    return digest.hexdigest()
