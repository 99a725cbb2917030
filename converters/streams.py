"""Reading tensors out of files, block by block, in bounded memory."""

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from converters import torchfile
from converters.tensors import ITEM_SIZES, Blob, Flat, Piece, Shape, Tensor, contiguous_strides
from converters.torchfile import reading
from hybrid.errors import CheckpointError

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 8 << 20
"""What one thread reads, converts and writes at a time."""

_WORDS = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


class Reader:
    """Opens each file once and reads from several threads. A context manager: leaving it closes the files.

    Reading raises CheckpointError for whatever the file system says of a file.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._elements: dict[Blob, int] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for view in self._maps.values():
            with contextlib.suppress(BufferError):  # an error that is on its way up still holds a part of it
                view.close()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._maps, self._descriptors = {}, {}

    def blocks(self, tensor: Tensor | Flat, size: int = BLOCK_BYTES) -> Iterator[memoryview]:
        """The bytes of `tensor` in order (little endian, last dimension fastest), in blocks of at most `size` bytes.

        A block is valid until the next one is asked for. Raises CheckpointError if a file ends before the tensor does.
        """
        if isinstance(tensor, Flat):
            for part in tensor.parts:
                yield from self.blocks(part, size)
            return
        item = ITEM_SIZES[tensor.dtype]
        buffer = np.empty(min(size, tensor.nbytes) // item * item or item, np.uint8)
        for start, shape in boxes(tensor.shape, max(1, size // item)):
            count = int(np.prod(shape, dtype=np.int64))
            out = buffer[: count * item].view(_WORDS[item]).reshape(shape)
            self._fill(out, tensor, start, shape)
            yield memoryview(buffer[: count * item])

    def array(self, tensor: Tensor) -> np.ndarray:
        """The whole tensor as unsigned words of its element size."""
        return self.box(tensor, (0,) * len(tensor.shape), tensor.shape)

    def box(self, tensor: Tensor, start: Shape, shape: Shape) -> np.ndarray:
        """The box of `shape` at index `start` of the tensor as unsigned words of its element size."""
        out = np.empty(shape, _WORDS[ITEM_SIZES[tensor.dtype]])
        self._fill(out, tensor, start, shape)
        return out

    def tensor(self, tensor: Tensor) -> "torch.Tensor":
        """The whole tensor as torch's."""
        return _values(self.array(tensor), tensor.dtype)

    def largest(self, tensor: Tensor) -> float:
        """The largest magnitude among the finite values of a tensor of floats; 0 if there are none."""
        result = 0.0
        for part in boxes(tensor.shape, BLOCK_BYTES // ITEM_SIZES[tensor.dtype]):
            values = _values(self.box(tensor, *part), tensor.dtype)
            low, high = (float(end) for end in values.aminmax())
            if not (isfinite(low) and isfinite(high)):
                finite = values[values.isfinite()]
                low, high = (float(end) for end in finite.aminmax()) if len(finite) else (0.0, 0.0)
            result = max(result, -low, high)
        return result

    def _fill(self, out: np.ndarray, tensor: Tensor, start: Shape, shape: Shape) -> None:
        for piece in tensor.pieces:
            part = piece.cut(start, shape)
            if part is None:
                continue
            # With the ellipsis, indexing gives a view even of an array without dimensions.
            target = out[(..., *(slice(a - s, b - s) for a, b, s in zip(part.start, part.end, start, strict=True)))]
            if isinstance(part.source, Blob):
                part = self._located(part, part.source)
            if part.source is None:
                target[...] = 0
            elif part.dtype != tensor.dtype:
                words = np.empty(part.shape, _WORDS[ITEM_SIZES[part.dtype]])
                self._copy(words, part)
                target[...] = converted(words, part.dtype, tensor.dtype)
            else:
                self._copy(target, part)

    def _copy(self, target: np.ndarray, piece: Piece) -> None:
        item = ITEM_SIZES[piece.dtype]
        if isinstance(piece.source, bytes):
            target[...] = _view(piece.source, piece, item)
        elif piece.contiguous and target.flags.c_contiguous:
            self._read(piece, memoryview(target.reshape(-1).view(np.uint8)))
        else:
            target[...] = _view(self._map(piece), piece, item)

    def _located(self, piece: Piece, blob: Blob) -> Piece:
        # Two threads may look up the same blob; they find the same.
        if blob not in self._elements:
            with reading(blob.path):
                self._elements[blob] = torchfile.elements(blob)
        return replace(piece, source=blob.path, offset=self._elements[blob] + piece.offset)

    def _read(self, piece: Piece, target: memoryview) -> None:
        assert isinstance(piece.source, Path)
        descriptor = self._descriptor(piece.source)
        done = 0
        while done < len(target):
            with reading(piece.source):
                count = os.preadv(descriptor, [target[done:]], piece.offset + done)
            if count == 0:
                raise _truncated(piece.source, piece.offset + len(target))
            done += count

    def _descriptor(self, path: Path) -> int:
        with self._lock, reading(path):
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]

    def _map(self, piece: Piece) -> mmap.mmap:
        assert isinstance(piece.source, Path)
        descriptor = self._descriptor(piece.source)
        with self._lock, reading(piece.source):
            if piece.source not in self._maps:
                self._maps[piece.source] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            view = self._maps[piece.source]
        reach = sum((n - 1) * s for n, s in zip(piece.shape, piece.strides, strict=True)) + 1
        end = piece.offset + reach * ITEM_SIZES[piece.dtype]
        if end > len(view):
            raise _truncated(piece.source, end)
        return view


def boxes(shape: Shape, limit: int) -> Iterator[tuple[Shape, Shape]]:
    """Cut a box into boxes (start, shape) of at most `limit` elements, each a run of consecutive elements, in order."""
    if not shape:
        yield (), ()
        return
    inner = contiguous_strides(shape)
    # The first dimension of which at least one index fits into the limit; those before it are gone through one by one.
    dim = next((d for d, size in enumerate(inner) if size <= limit), len(shape) - 1)
    step = max(1, limit // inner[dim])
    for prefix in product(*(range(n) for n in shape[:dim])):
        for first in range(0, shape[dim], step):
            start = (*prefix, first, *(0 for _ in shape[dim + 1 :]))
            yield start, (*(1 for _ in prefix), min(step, shape[dim] - first), *shape[dim + 1 :])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bit by bit. What lies in the same bytes is not read."""
    if a == b:
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    limit = BLOCK_BYTES // ITEM_SIZES[a.dtype]
    with Reader() as reader:
        return all(np.array_equal(reader.box(a, *part), reader.box(b, *part)) for part in boxes(a.shape, limit))


def converted(words: np.ndarray, source: str, target: str) -> np.ndarray:
    """Change number formats as torch does (round to nearest even); arrays hold the elements as unsigned words."""
    import torch

    values = _values(words, source).to(getattr(torch, target))
    size = ITEM_SIZES[target]
    signless = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return values.view(signless).numpy().view(_WORDS[size])


def _values(words: np.ndarray, dtype: str) -> "torch.Tensor":
    """The numbers of a format whose elements are given as unsigned words."""
    import torch

    return torch.from_numpy(words.view(words.dtype.str.replace("u", "i"))).view(getattr(torch, dtype))


def _view(source: bytes | mmap.mmap, piece: Piece, item: int) -> np.ndarray:
    strides = tuple(step * item for step in piece.strides)
    return np.ndarray(piece.shape, _WORDS[item], buffer=source, offset=piece.offset, strides=strides)


def _truncated(path: Path, end: int) -> CheckpointError:
    return CheckpointError(f"{path} is truncated: it has {path.stat().st_size} bytes, its tensors reach to byte {end}")
