"""Fine-tuning data: JSONL or Parquet of examples, encoded once into the cache, cut into splits, and packed.

In the cache an example is a document of a `.bin/.idx` pair whose sequences are given and learned in turn.
"""

import hashlib
import json
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid.config import DataConfig
from hybrid.data.cache import available_cores, cache_folder, make_folder
from hybrid.data.corpus import SPLITS, normalized
from hybrid.data.encode import encode_blocks
from hybrid.data.examples import Example, encode_examples
from hybrid.data.indexed import IndexedWriter, read_index, token_dtype
from hybrid.data.inputs import InputFile, example_files, read_blocks
from hybrid.data.packed import Examples, Packed
from hybrid.data.progress import byte_progress
from hybrid.data.tokenizer import Tokenizer
from hybrid.errors import ConfigError, Problem

_FORMAT = 1
_MANIFEST = "examples.json"
# Fewer bytes are encoded before several processes have started.
_WORTH_WORKERS = 16 << 20


@dataclass
class FineTuning:
    """What a fine-tuning run reads, and what is to be said of it."""

    train: Packed
    validation: dict[str, Packed]
    test: dict[str, Packed]
    fingerprint: str
    notes: list[str]


def prepare(data: DataConfig, tokenizer: Tokenizer, quiet: bool = False) -> Path:
    """Return the folder in the cache with the examples that `data` names, encoded now or before.

    Raises ConfigError for files that are missing, empty or of another kind, UserError for a record that is no example
    (file and line) and for a cache that cannot be written.
    """
    given = {"train": data.path, "validation": data.validation_path, "test": data.test_path}
    files = {split: example_files(path, _place(split)) for split, path in given.items() if path}
    facts = [_FORMAT, tokenizer.unique_identifiers]
    facts += [[split, [[str(f.path), f.size, f.mtime_ns] for f in found]] for split, found in files.items()]
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
    final = cache_folder(data) / "examples" / name
    if final.is_dir():
        try:
            read_index(final / "examples", "data.cache")
            json.loads((final / _MANIFEST).read_text())
            return final
        except (ConfigError, OSError, ValueError):
            shutil.rmtree(final)
    return make_folder(final, lambda folder: _encode(folder, files, tokenizer, quiet))


def _place(split: str) -> str:
    return "data.path" if split == "train" else f"data.{split}_path"


def _encode(folder: Path, files: dict[str, list[InputFile]], tokenizer: Tokenizer, quiet: bool) -> None:
    writer = IndexedWriter(folder / "examples", token_dtype(tokenizer.vocab_size))
    total = sum(file.size for found in files.values() for file in found)
    workers = 1 if total < _WORTH_WORKERS else available_cores()
    counts = dict.fromkeys(files, 0)
    digest = hashlib.sha256()
    pick = Example(tokenizer.chat_template)
    try:
        with byte_progress("preparing examples", total, quiet) as advance:
            for split, found in files.items():
                blocks = encode_blocks(read_blocks(found, pick), tokenizer, workers, encode_examples)
                with closing(blocks):
                    for block, encoded in blocks:
                        writer.add(encoded.tokens, encoded.lengths, encoded.counts)
                        counts[split] += len(encoded.counts)
                        digest.update(encoded.tokens.data)
                        digest.update(encoded.lengths.data)
                        advance(block.source_bytes)
                if not counts[split]:
                    raise ConfigError(Problem(_place(split), "there are no examples in these files"))
        writer.close()
    finally:
        writer.abandon()
    facts = {"examples": counts, "sha256": digest.hexdigest(), "tokenizer": tokenizer.unique_identifiers}
    facts["files"] = {split: [str(file.path) for file in found] for split, found in files.items()}
    (folder / _MANIFEST).write_text(json.dumps(facts, indent=2) + "\n")


def load(
    data: DataConfig,
    folder: Path,
    tokenizer: Tokenizer,
    *,
    seed: int,
    train_samples: int,
    validation_samples: int | None,
) -> FineTuning:
    """Pack the examples that `prepare` encoded. Raises ConfigError for examples that `data` has no place for."""
    manifest = json.loads((folder / _MANIFEST).read_text())
    examples = _read(folder)
    splits = _split(examples, manifest["examples"], data)
    notes: list[str] = []
    packed: dict[str, Packed] = {}
    for split in SPLITS:
        chosen, note = _fitting(examples, splits.get(split, np.zeros(0, np.int64)), data, split)
        if not len(chosen):
            if split == "train":
                raise ConfigError(
                    Problem("data.path", "there are no examples to train on" + (f" ({note})" if note else ""))
                )
            continue
        packed[split] = Packed(
            examples,
            chosen,
            data.sequence_length,
            tokenizer.eod,
            samples=train_samples if split == "train" else validation_samples,
            seed=seed if split == "train" else None,
        )
        rows, full = packed[split].rows, packed[split].fullness
        notes.append(
            f"{split} {len(chosen):,} examples in {rows:,} sequences of {data.sequence_length:,} ({full:.1%} full)"
            + note
        )
    held_out = {split: {split: packed[split]} if split in packed else {} for split in SPLITS[1:]}
    fingerprint = f"{manifest['sha256']} {data.too_long}"
    return FineTuning(packed["train"], held_out["validation"], held_out["test"], fingerprint, notes)


def _read(folder: Path) -> Examples:
    prefix = folder / "examples"
    index = read_index(prefix, "data.cache")
    edges = np.concatenate([[0], index.lengths.cumsum(dtype=np.int64)])
    # A sequence is learned if it is the second, fourth, ... of its document.
    number = np.arange(len(index.lengths)) - np.repeat(index.documents[:-1], np.diff(index.documents))
    learned = np.repeat(number % 2 == 1, index.lengths)
    tokens = np.memmap(f"{prefix}.bin", index.dtype, "r", shape=(index.tokens,))
    return Examples(tokens, learned, edges[index.documents])


def _split(examples: Examples, counts: dict[str, int], data: DataConfig) -> dict[str, NDArray[np.int64]]:
    """Which examples are of which split: of files of their own, or shares of all in the order of their digests.

    Examples that are there twice have one digest, and are neighbours in that order.
    """
    if len(counts) > 1:
        edges = np.cumsum([0, *counts.values()])
        return {split: np.arange(edges[i], edges[i + 1]) for i, split in enumerate(counts)}
    count = len(examples.starts) - 1
    digests = [
        hashlib.sha256(examples.tokens[examples.starts[i] : examples.starts[i + 1]].tobytes()).digest()[:8]
        for i in range(count)
    ]
    order = np.argsort(np.array(digests, "S8"), kind="stable").astype(np.int64)
    shares = normalized(data.split)
    held = [max(1, round(share * count)) if share else 0 for share in shares[1:]]
    if count <= sum(held):
        message = f"leaves none of the {count} examples to train on: set it to [1, 0, 0], or give data.validation_path"
        raise ConfigError(Problem("data.split", message))
    known = [digests[index] for index in order]
    cuts = [count - sum(held), count - held[1]]
    for number, cut in enumerate(cuts):
        while 0 < cut < count and known[cut - 1] == known[cut]:  # both of them on one side
            cut -= 1
        cuts[number] = cut
    if not cuts[0]:
        message = f"leaves nothing to train on: the {count} examples are one and the same; set it to [1, 0, 0]"
        raise ConfigError(Problem("data.split", message))
    parts = np.split(order, cuts)
    return dict(zip(SPLITS, (np.sort(part) for part in parts), strict=True))


def _fitting(examples: Examples, chosen: NDArray, data: DataConfig, split: str) -> tuple[NDArray, str]:
    """The examples that can be taken, and what is to be said of the others. Raises ConfigError if they are refused."""
    tokens = examples.starts[chosen + 1] - examples.starts[chosen]
    limit = data.sequence_length + 1  # the first token is not predicted, the last predicts nothing
    long = tokens > limit
    if not long.any():
        return chosen, ""
    count = f"{long.sum():,} of {len(chosen):,} {'' if split == 'train' else split + ' '}examples"
    if data.too_long == "refuse":
        message = (
            f"is {data.sequence_length}, room for examples of {limit} tokens, but {count} are longer, the longest "
            f"{tokens.max()} tokens; set it to at least {tokens.max() - 1}, or data.too_long to 'truncate' or 'drop'"
        )
        raise ConfigError(Problem("data.sequence_length", message))
    if data.too_long == "drop":
        return chosen[~long], f"; {count} were longer and dropped"
    ends = np.minimum(examples.starts[chosen + 1], examples.starts[chosen] + limit)
    anything = np.array(
        [examples.learned[start + 1 : end].any() for start, end in zip(examples.starts[chosen], ends, strict=True)]
    )
    lost = int((long & ~anything).sum())
    without = f", {lost:,} of them left out, as nothing to learn was left" if lost else ""
    return chosen[~long | anything], f"; {count} were longer and truncated{without}"
