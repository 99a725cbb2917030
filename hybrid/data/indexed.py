"""Megatron's `.bin/.idx` pair: tokens one after another, and where each document begins. Needs numpy only.

Format, from `megatron/core/datasets/indexed_dataset.py` (little-endian throughout):

    .bin  the token ids of all documents, end to end, uint16 or int32
    .idx  "MMIDIDX\\0\\0", u64 version = 1, u8 dtype code, u64 S = sequences, u64 D = documents + 1,
          i32[S] tokens of each sequence, i64[S] its byte offset in .bin, i64[D] sequence where each document begins

The writer gives the bytes that upstream's `IndexedDatasetBuilder` gives (a test compares them), without its ten seconds
of import and without a Python object per document.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import ConfigError, Problem

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_SLICE = 1 << 20
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that Megatron stores such a vocabulary in (`DType.optimal_dtype`)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class Index:
    """What an `.idx` says: dtype of the tokens, tokens of each sequence, sequence where each document begins."""

    dtype: np.dtype
    lengths: NDArray[np.int32]
    documents: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))


def write_index(file: BinaryIO, dtype: np.dtype, lengths: NDArray[np.int32], counts: NDArray[np.int32]) -> None:
    """Write an `.idx`: `lengths` (S,) tokens of each sequence, `counts` (D - 1,) sequences of each document.

    Both may be memory maps: a slice at a time is in memory.
    """
    file.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], len(lengths), len(counts) + 1))
    for part in _slices(lengths):
        file.write(part.astype("<i4").tobytes())
    _write_starts(file, lengths, dtype.itemsize)
    _write_starts(file, counts, 1)
    file.write(struct.pack("<q", counts.sum(dtype=np.int64)))


def _write_starts(file: BinaryIO, sizes: NDArray[np.int32], unit: int) -> None:
    """Write where each of some things begins, given the size of each, as i64."""
    start = 0
    for part in _slices(sizes):
        ends = start + np.cumsum(part, dtype=np.int64) * unit
        file.write((ends - part.astype(np.int64) * unit).astype("<i8").tobytes())
        start = int(ends[-1])


def _slices(values: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
    return (values[at : at + _SLICE] for at in range(0, len(values), _SLICE))


class IndexedWriter:
    """Writes `prefix.bin` and `prefix.idx`, a document at a time.

    The files are where they will stay from the first byte on: write into a folder that is renamed when all is done.
    """

    def __init__(self, prefix: Path, dtype: np.dtype):
        self.prefix, self.dtype = prefix, dtype
        self._bin = open(f"{prefix}.bin", "wb")  # noqa: SIM115 (closed in close)
        self._lengths: list[NDArray[np.int32]] = []
        self._counts: list[NDArray[np.int32]] = []

    def add(self, tokens: NDArray, lengths: NDArray[np.int32], counts: NDArray[np.int32] | None = None) -> None:
        """Append documents: their tokens end to end, the tokens of each sequence, the sequences of each document.

        Without `counts` every sequence is a document.
        """
        assert tokens.dtype == self.dtype and lengths.sum(dtype=np.int64) == len(tokens)
        self._bin.write(tokens.data)
        self._lengths.append(lengths)
        self._counts.append(np.ones(len(lengths), np.int32) if counts is None else counts)

    def close(self) -> Index:
        """Finish both files and put them on the disk."""
        lengths, counts = (np.concatenate([np.zeros(0, np.int32), *part]) for part in (self._lengths, self._counts))
        with open(f"{self.prefix}.idx", "wb") as file:
            write_index(file, self.dtype, lengths, counts)
            for each in (file, self._bin):
                each.flush()
                os.fsync(each.fileno())
        self._bin.close()
        return Index(self.dtype, lengths, np.concatenate([[0], counts.cumsum(dtype=np.int64)]))

    def abandon(self) -> None:
        """Close what is open, after a failure."""
        self._bin.close()


def files_of(prefix: str | Path, place: str) -> tuple[Path, Path]:
    """`prefix.idx` and `prefix.bin`. Raises ConfigError when there is no such file."""
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file in (idx, bin_):
        if not file.is_file():
            raise ConfigError(Problem(place, f"there is no file '{file}': give the path without .bin and .idx"))
    return idx, bin_


def read_index(prefix: str | Path, place: str) -> Index:
    """Read `prefix.idx` and check it against `prefix.bin`.

    Raises ConfigError, in which `place` names the setting, when a file is missing, empty, cut short, of another format
    or does not match the other. The check costs one pass over the index, none over the tokens.
    """
    idx, bin_ = files_of(prefix, place)
    try:
        raw = np.memmap(idx, mode="r") if idx.stat().st_size else np.zeros(0, np.uint8)
        bin_size = bin_.stat().st_size
        with bin_.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(Problem(place, f"'{error.filename or idx}' cannot be read: {error.strerror}")) from error
    if len(raw) < _HEADER.size or bytes(raw[:9]) != _MAGIC:
        raise ConfigError(Problem(place, f"'{idx}' is not an index of Megatron's format; make it anew"))
    _, version, code, sequences, documents = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    if version != 1 or code not in _DTYPES:
        raise ConfigError(Problem(place, f"'{idx}' has version {version} and token type {code}, which nobody writes"))
    expected = _HEADER.size + 12 * sequences + 8 * documents
    # A multimodal index has one more byte a sequence; upstream reads it as text too.
    if len(raw) not in (expected, expected + sequences):
        raise ConfigError(Problem(place, f"'{idx}' has {len(raw)} bytes instead of {expected}; make it anew"))
    body = raw[_HEADER.size :]
    lengths = body[: 4 * sequences].view("<i4")
    starts = body[12 * sequences : 12 * sequences + 8 * documents].view("<i8")
    index = Index(np.dtype(_DTYPES[code]), lengths, starts)
    if sequences == 0 or index.tokens == 0:
        raise ConfigError(Problem(place, f"'{prefix}' holds no tokens"))
    if index.tokens * index.dtype.itemsize != bin_size:
        message = f"'{bin_}' has {bin_size} bytes, but its index speaks of {index.tokens * index.dtype.itemsize}"
        raise ConfigError(Problem(place, f"{message}; the two are not of one preparation"))
    return index
