"""`hybrid data prepare`: text, JSONL and Parquet to one `.bin/.idx` pair, in many processes, restartable.

While it runs, everything is in the folder `PREFIX.unfinished`: tokens, lengths, and a journal of how many blocks they
hold. The same command goes on from there; PREFIX.bin and PREFIX.idx appear when they are complete.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hybrid import atomic
from hybrid.data.cache import available_cores, clear_errors
from hybrid.data.corpus import describe_skipped
from hybrid.data.encode import BLOCK_BYTES, Encoded, encode_blocks
from hybrid.data.indexed import read_index, token_dtype, write_index
from hybrid.data.inputs import BadDocument, InputFile, Text, find_inputs, read_blocks
from hybrid.data.progress import byte_progress
from hybrid.data.tokenizer import Tokenizer
from hybrid.errors import ConfigError, Problem, UserError

_JOURNAL_SECONDS = 5.0
_WAY_OUT = "make room or choose another --output; the same command goes on where it stopped"


@dataclass
class Prepared:
    """What `prefix.bin` and `prefix.idx` hold. `seconds` and `encoded_tokens` are those of the last run alone."""

    prefix: str
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    text_bytes: int = 0
    reused: bool = False
    seconds: float = field(default=0.0, compare=False)
    encoded_tokens: int = field(default=0, compare=False)

    def facts(self) -> dict[str, Any]:
        """What is said of it, as JSON takes it."""
        return {name: value for name, value in asdict(self).items() if name != "encoded_tokens"}

    def __str__(self) -> str:
        megabytes = self.text_bytes / 1e6
        what = f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens, {megabytes:,.2f} MB of text"
        if self.reused:
            return f"{what}, prepared before"
        return f"{what} in {self.seconds:.1f} s ({self.encoded_tokens / self.seconds:,.0f} tokens/s)"


@dataclass
class _Journal:
    """How much of the unfinished files counts: blocks and bytes of the input that are done, and what they gave."""

    fingerprint: str
    blocks: int = 0
    source_bytes: int = 0
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    text_bytes: int = 0
    indexed: bool = False


def prepare_files(
    inputs: list[str],
    *,
    tokenizer: Tokenizer,
    output: str,
    key: str = "text",
    workers: int | None = None,
    quiet: bool = False,
) -> Prepared:
    """Write `output.bin` and `output.idx` from files and folders; what they hold is said in `output.json`.

    The bytes are those of Megatron's tools/preprocess_data.py with --append-eod, for one key, the same tokenizer and
    JSONL. `key` is the JSON key or the Parquet column of the text; `workers` processes encode (None: one a core).

    In a folder, files that are empty or not text are passed over, and their number is said.

    A run that was stopped goes on with the same arguments; one that was finished is not done again. Raises ConfigError
    for inputs that cannot be used and for an output that is there already, UserError for a document that cannot be
    read (file and line), a full disk, or another process that writes to the same output.
    """
    left_out: Counter[str] = Counter()
    prefix = Path(output).expanduser()
    files = find_inputs(inputs, left_out=left_out, output=prefix)
    if left_out and not quiet:
        print(f"left out: {describe_skipped(left_out)}", file=sys.stderr)
    fingerprint = _fingerprint(files, tokenizer, key)
    if (finished := _finished(prefix, fingerprint)) is not None:
        return finished
    workers = workers or available_cores()
    began = time.monotonic()
    folder = Path(f"{prefix}.unfinished")
    with clear_errors(prefix.parent, _WAY_OUT):
        folder.mkdir(parents=True, exist_ok=True)
        with _only_process(folder):
            journal = _read_journal(folder, fingerprint, tokenizer)
            before = journal.tokens
            if not journal.indexed:
                if journal.blocks and not quiet:
                    print(f"going on after {journal.documents:,} documents", file=sys.stderr)
                _encode_files(files, key, tokenizer, workers, folder, journal, quiet)
                _write_index(folder, journal, tokenizer)
            _publish(folder, prefix, journal, tokenizer)
    prepared = Prepared(str(prefix), journal.documents, journal.sequences, journal.tokens, journal.text_bytes)
    prepared.seconds, prepared.encoded_tokens = time.monotonic() - began, journal.tokens - before
    return prepared


def _fingerprint(files: list[InputFile], tokenizer: Tokenizer, key: str) -> str:
    facts = [1, BLOCK_BYTES, key, tokenizer.unique_identifiers, [[str(f.path), f.size, f.mtime_ns] for f in files]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _finished(prefix: Path, fingerprint: str) -> Prepared | None:
    """Return what was prepared before from the same; None when there is nothing. Raises ConfigError for other data."""
    there = [path for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")) if path.exists()]
    if not there or Path(f"{prefix}.unfinished").exists():
        return None
    try:
        facts = json.loads(Path(f"{prefix}.json").read_text())
        same = facts.pop("fingerprint") == fingerprint
    except (OSError, ValueError, KeyError):
        same, facts = False, {}
    if not same:
        message = f"'{there[0]}' is there already, from other inputs: remove it or choose another --output"
        raise ConfigError(Problem("--output", message))
    read_index(prefix, "--output")
    facts.pop("tokenizer")
    return Prepared(str(prefix), **facts, reused=True)


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing to '{folder}': wait for it or choose another --output"
            ) from error
        yield


def _read_journal(folder: Path, fingerprint: str, tokenizer: Tokenizer) -> _Journal:
    """Return the journal of an unfinished run of the same; a new one where there is none, or its files fell short."""
    try:
        journal = _Journal(**json.loads((folder / "journal.json").read_text()))
        if journal.indexed and journal.fingerprint == fingerprint:
            return journal  # nothing is left but to move the files
        itemsize = token_dtype(tokenizer.vocab_size).itemsize
        sizes = {"tokens": journal.tokens * itemsize, "lengths": 4 * journal.sequences, "counts": 4 * journal.documents}
        if journal.fingerprint == fingerprint and all((folder / n).stat().st_size >= s for n, s in sizes.items()):
            for name, size in sizes.items():
                os.truncate(folder / name, size)
            return journal
    except (OSError, ValueError, TypeError):
        pass
    for name in ("journal.json", "tokens", "lengths", "counts", "index"):
        (folder / name).unlink(missing_ok=True)
    return _Journal(fingerprint)


def _encode_files(
    files: list[InputFile],
    key: str,
    tokenizer: Tokenizer,
    workers: int,
    folder: Path,
    journal: _Journal,
    quiet: bool,
) -> None:
    blocks = islice(read_blocks(files, Text(key)), journal.blocks, None)
    encoded_blocks = encode_blocks(blocks, tokenizer, workers)
    total = sum(file.size for file in files)
    with (
        (folder / "tokens").open("ab") as tokens,
        (folder / "lengths").open("ab") as lengths,
        (folder / "counts").open("ab") as counts,
        closing(encoded_blocks),
    ):
        noted = time.monotonic()

        def note() -> None:
            for each in (tokens, lengths, counts):
                each.flush()
                os.fsync(each.fileno())
            _write_journal(folder, journal)

        with byte_progress("preparing", total, quiet, journal.source_bytes) as advance:
            try:
                for block, encoded in encoded_blocks:
                    tokens.write(encoded.tokens.data)
                    lengths.write(encoded.lengths.data)
                    counts.write(encoded.counts.data)
                    _count(journal, encoded, block.source_bytes)
                    advance(block.source_bytes)
                    if time.monotonic() - noted > _JOURNAL_SECONDS:
                        note()
                        noted = time.monotonic()
            except BadDocument:
                shutil.rmtree(folder)  # the inputs have to change, so this cannot be gone on with
                raise
            except KeyboardInterrupt:
                note()
                print("stopped; the same command goes on from here", file=sys.stderr)
                raise
        note()
    if journal.tokens == 0:
        shutil.rmtree(folder)
        raise ConfigError(Problem("INPUT", "there is no text in the inputs"))


def _count(journal: _Journal, encoded: Encoded, source_bytes: int) -> None:
    journal.blocks += 1
    journal.source_bytes += source_bytes
    journal.documents += len(encoded.counts)
    journal.sequences += len(encoded.lengths)
    journal.tokens += len(encoded.tokens)
    journal.text_bytes += encoded.text_bytes


def _write_journal(folder: Path, journal: _Journal) -> None:
    atomic.write_text(folder / "journal.json", json.dumps(asdict(journal)))


def _write_index(folder: Path, journal: _Journal, tokenizer: Tokenizer) -> None:
    lengths, counts = (np.memmap(folder / name, np.int32, "r") for name in ("lengths", "counts"))
    with (folder / "index").open("wb") as file:
        write_index(file, token_dtype(tokenizer.vocab_size), lengths, counts)
        file.flush()
        os.fsync(file.fileno())
    journal.indexed = True
    _write_journal(folder, journal)


def _publish(folder: Path, prefix: Path, journal: _Journal, tokenizer: Tokenizer) -> None:
    """Move the files to where they belong. A run that is stopped in between does here what is left to do."""
    if (folder / "tokens").exists():
        (folder / "tokens").rename(f"{prefix}.bin")
    facts = {name: getattr(journal, name) for name in ("documents", "sequences", "tokens", "text_bytes", "fingerprint")}
    facts["tokenizer"] = tokenizer.unique_identifiers
    atomic.write_text(Path(f"{prefix}.json"), json.dumps(facts, indent=2) + "\n")
    if (folder / "index").exists():
        (folder / "index").rename(f"{prefix}.idx")
    shutil.rmtree(folder)
