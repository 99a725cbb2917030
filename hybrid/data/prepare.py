"""A corpus of text files to `.bin/.idx` files in the cache, once per (files, tokenizer, split)."""

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hybrid.config import DataConfig
from hybrid.data import corpus
from hybrid.data.cache import available_cores, cache_folder, make_folder
from hybrid.data.encode import BLOCK_BYTES, Texts, encode_blocks
from hybrid.data.indexed import IndexedWriter, read_index, token_dtype
from hybrid.data.progress import byte_progress
from hybrid.data.tokenizer import ByteTokenizer, Tokenizer
from hybrid.errors import ConfigError, Problem

_FORMAT = 1
_MANIFEST = "corpus.json"
# A corpus of fewer bytes is encoded before several processes have started.
_WORTH_WORKERS = 32 << 20


@dataclass
class Part:
    """How much a split holds: documents, tokens (ends of documents included), and bytes of text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass
class Corpus:
    """A prepared corpus. `parts` holds the splits that are not empty; `sha256` is that of the training tokens."""

    folder: Path
    parts: dict[str, Part]
    skipped: Counter[str] = field(default_factory=Counter)
    sha256: str = ""
    reused: bool = False

    def prefix(self, split: str) -> str | None:
        """Path of a split's files without .bin and .idx; None for a split that has none."""
        return str(self.folder / split) if split in self.parts else None

    def __str__(self) -> str:
        parts = (f"{name} {part.documents:,} files, {part.tokens:,} tokens" for name, part in self.parts.items())
        skipped = f"; left out: {corpus.describe_skipped(self.skipped)}" if self.skipped else ""
        return f"data {'reused' if self.reused else 'prepared'}: {'; '.join(parts)}{skipped} ({self.folder})"


def prepare_corpus(data: DataConfig, tokenizer: Tokenizer, quiet: bool = False) -> Corpus:
    """Return the corpus that `data.source` "stdlib" or "text" names, made now or found in the cache.

    Shows a progress bar on a terminal and ends with one line on stderr, unless `quiet`. Raises ConfigError when the
    folder is missing, holds no text or the split is impossible, UserError when the cache cannot be written.
    """
    files = corpus.find_files(data)
    pieces = corpus.split_files(files.found, data.split)
    final = cache_folder(data) / "corpora" / _key(files, tokenizer, data.split)
    prepared = _load(final)
    if prepared is None:
        make_folder(final, lambda folder: _write(folder, files, pieces, tokenizer, quiet))
        prepared = _load(final)
        assert prepared is not None
        prepared.reused = False
    if not quiet:
        print(prepared, file=sys.stderr)
    return prepared


def _key(files: corpus.Files, tokenizer: Tokenizer, split: list[float]) -> str:
    """A name for the outcome: it changes when a file, the tokenizer, the split or the format does."""
    facts = [_FORMAT, tokenizer.unique_identifiers, corpus.normalized(split)]
    facts += [[file.name, file.size, file.mtime_ns] for file in files.found]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _load(folder: Path) -> Corpus | None:
    """Return the corpus in `folder`; None, with the folder removed, when there is none or its files were damaged."""
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        parts = {name: Part(**part) for name, part in manifest["parts"].items()}
        for name, part in parts.items():
            if read_index(folder / name, "data.cache").tokens != part.tokens:
                raise ValueError(name)
        return Corpus(folder, parts, Counter(manifest["skipped"]), manifest["sha256"], reused=True)
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        shutil.rmtree(folder)
        return None


def _write(
    folder: Path, files: corpus.Files, pieces: dict[str, list[corpus.Piece]], tokenizer: Tokenizer, quiet: bool
) -> None:
    """Write the `.bin/.idx` of each split and, last, the manifest."""
    parts = {}
    skipped = Counter(files.skipped)
    digest = hashlib.sha256()
    total = sum(file.size for file in files.found)
    workers = 1 if isinstance(tokenizer, ByteTokenizer) or total < _WORTH_WORKERS else available_cores()
    with byte_progress("preparing data", total, quiet) as advance:
        for name in (name for name in corpus.SPLITS if pieces[name]):
            part = Part()
            writer = IndexedWriter(folder / name, token_dtype(tokenizer.vocab_size))
            try:
                with closing(encode_blocks(_blocks(pieces[name], skipped), tokenizer, workers)) as encoded_blocks:
                    for block, encoded in encoded_blocks:
                        writer.add(encoded.tokens, encoded.lengths)
                        part.documents += len(encoded.lengths)
                        part.bytes += encoded.text_bytes
                        if name == "train":
                            digest.update(encoded.tokens.data)
                        advance(block.source_bytes)
                part.tokens = writer.close().tokens
            finally:
                writer.abandon()
            if part.tokens == 0:
                message = f"all text for {name} is unreadable ({corpus.describe_skipped(skipped)})"
                raise ConfigError(Problem("data.path", message))
            parts[name] = part
    manifest = {
        "parts": {name: asdict(part) for name, part in parts.items()},
        "skipped": skipped,
        "sha256": digest.hexdigest(),
        "folder": str(files.folder),
        "tokenizer": tokenizer.unique_identifiers,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _blocks(pieces: list[corpus.Piece], skipped: Counter[str]) -> Iterator[Texts]:
    """Yield the texts of the pieces, some megabytes at a time, and count what is no text after all."""
    texts, size = [], 0
    for piece in pieces:
        size += int((piece.stop - piece.start) * piece.file.size)
        try:
            texts.append(piece.cut(piece.file.path.read_bytes()).decode("utf-8"))
        except OSError:
            skipped["unreadable"] += 1
        except UnicodeDecodeError:
            skipped["not UTF-8 text"] += 1
        if size >= BLOCK_BYTES:
            yield Texts(texts, size)
            texts, size = [], 0
    yield Texts(texts, size)
