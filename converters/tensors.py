"""Tensors that are still in files: shapes, and where the bytes of each part lie.

A `Tensor` is a box of elements tiled by pieces. A piece is a strided view of a file (or of a few bytes in memory, or
zeros), so cutting, joining and reordering tensors moves no data; `converters.streams` reads them, block by block.
Nothing here imports torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

Shape = tuple[int, ...]

ITEM_SIZES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of an element, by torch's name of the number format."""

FLOATS = ("float64", "float32", "bfloat16", "float16")
"""The number formats that a conversion can change into one another."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A file of torch.save with one contiguous tensor in it, `length` bytes of `path` from `start` on.

    Where in it the elements begin is looked up when they are read (`converters.torchfile.elements`).
    """

    path: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor: the box of `shape` that begins at index `start`, found in `source` from byte `offset` on.

    `strides` are in elements of the source. `source` is a file, the elements in a blob, bytes in memory, or None for
    zeros.
    """

    start: Shape
    shape: Shape
    strides: Shape
    dtype: str
    source: Path | Blob | bytes | None
    offset: int

    @property
    def end(self) -> Shape:
        """The index after the last, in every dimension."""
        return tuple(a + n for a, n in zip(self.start, self.shape, strict=True))

    def cut(self, start: Sequence[int], shape: Sequence[int]) -> "Piece | None":
        """The part of this piece that lies in the box of `shape` at `start` of the tensor; None if there is none."""
        low = tuple(max(a, b) for a, b in zip(self.start, start, strict=True))
        high = tuple(min(e, a + n) for e, a, n in zip(self.end, start, shape, strict=True))
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return None
        skipped = sum((a - b) * s for a, b, s in zip(low, self.start, self.strides, strict=True))
        offset = self.offset + skipped * ITEM_SIZES[self.dtype]
        return replace(self, start=low, shape=tuple(b - a for a, b in zip(low, high, strict=True)), offset=offset)

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in the source one after the other, in order."""
        wanted = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length != 1 and stride != wanted:
                return False
            wanted *= length
        return True


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of `shape` and `dtype` (torch's name) whose pieces tile it without overlap."""

    shape: Shape
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes, as it will be written."""
        return self.size * ITEM_SIZES[self.dtype]

    @property
    def files(self) -> set[Path]:
        """The files it is read from."""
        sources = (piece.source.path if isinstance(piece.source, Blob) else piece.source for piece in self.pieces)
        return {source for source in sources if isinstance(source, Path)}


@dataclass(frozen=True, slots=True)
class Flat:
    """Tensors one after the other, each with its elements in a row: one of one dimension, to be written as it is."""

    parts: tuple[Tensor, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Elements."""
        return sum(part.size for part in self.parts)

    @property
    def files(self) -> set[Path]:
        """The files it is read from."""
        return {file for part in self.parts for file in part.files}

    @property
    def shape(self) -> Shape:
        """One dimension."""
        return (self.size,)

    @property
    def nbytes(self) -> int:
        """Bytes, as it will be written."""
        return self.size * ITEM_SIZES[self.dtype]


def contiguous_strides(shape: Sequence[int]) -> Shape:
    """Strides in elements of a tensor whose last dimension runs fastest."""
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def stored(
    source: Path | Blob | bytes, offset: int, shape: Sequence[int], dtype: str, strides: Sequence[int] | None = None
) -> Tensor:
    """The tensor whose first element lies at byte `offset` of `source`; `strides` in elements, else contiguous."""
    shape = tuple(shape)
    steps = contiguous_strides(shape) if strides is None else tuple(strides)
    piece = Piece((0,) * len(shape), shape, steps, dtype, source, offset)
    return Tensor(shape, dtype, (piece,) if math.prod(shape) else ())


def zeros(shape: Sequence[int], dtype: str) -> Tensor:
    """A tensor of zeros."""
    shape = tuple(shape)
    return Tensor(shape, dtype, (Piece((0,) * len(shape), shape, contiguous_strides(shape), dtype, None, 0),))


def narrow(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
    """The indices [start, start + length) of dimension `dim`."""
    assert start >= 0 and start + length <= tensor.shape[dim], (tensor.shape, dim, start, length)
    low = tuple(start if d == dim else 0 for d in range(len(tensor.shape)))
    shape = tuple(length if d == dim else n for d, n in enumerate(tensor.shape))
    pieces = (piece.cut(low, shape) for piece in tensor.pieces)
    return Tensor(shape, tensor.dtype, tuple(_moved(piece, dim, -start) for piece in pieces if piece is not None))


def cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """The tensors one after the other along `dim`."""
    first = tensors[0]
    pieces: list[Piece] = []
    length = 0
    for tensor in tensors:
        assert tensor.dtype == first.dtype, (tensor.dtype, first.dtype)
        assert tensor.shape[:dim] == first.shape[:dim] and tensor.shape[dim + 1 :] == first.shape[dim + 1 :]
        pieces += [_moved(piece, dim, length) for piece in tensor.pieces]
        length += tensor.shape[dim]
    return Tensor((*first.shape[:dim], length, *first.shape[dim + 1 :]), first.dtype, _joined(pieces, dim))


def split(tensor: Tensor, dim: int, lengths: Sequence[int]) -> list[Tensor]:
    """Consecutive parts of these lengths along `dim`."""
    assert sum(lengths) == tensor.shape[dim], (tensor.shape, dim, lengths)
    parts: list[Tensor] = []
    start = 0
    for length in lengths:
        parts.append(narrow(tensor, dim, start, length))
        start += length
    return parts


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors along a new first dimension."""
    return cat([_unsqueeze(tensor) for tensor in tensors], 0)


def select(tensor: Tensor, index: int) -> Tensor:
    """The tensor at `index` of the first dimension, which falls away."""
    pieces = tuple(
        replace(piece, start=piece.start[1:], shape=piece.shape[1:], strides=piece.strides[1:])
        for piece in narrow(tensor, 0, index, 1).pieces
    )
    return Tensor(tensor.shape[1:], tensor.dtype, pieces)


def reshape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The same elements in order in another shape. Only for a tensor in one contiguous piece (or for no change)."""
    shape = tuple(shape)
    if shape == tensor.shape:
        return tensor
    assert math.prod(shape) == tensor.size, (tensor.shape, shape)
    (piece,) = tensor.pieces
    assert piece.contiguous or piece.source is None
    whole = replace(piece, start=(0,) * len(shape), shape=shape, strides=contiguous_strides(shape))
    return Tensor(shape, tensor.dtype, (whole,))


def reinterpret(tensor: Tensor, dtype: str) -> Tensor:
    """The bytes of a flat tensor of bytes, in one piece, read as another number format."""
    assert tensor.dtype == "uint8" and len(tensor.shape) == 1
    count = tensor.size // ITEM_SIZES[dtype]
    pieces = tuple(replace(piece, shape=(count,), dtype=dtype) for piece in tensor.pieces)
    return Tensor((count,), dtype, pieces)


def cast(tensor: Tensor, dtype: str) -> Tensor:
    """The values in another number format; they are converted when they are read."""
    return replace(tensor, dtype=dtype)


def place(parts: Sequence[tuple[Shape, Tensor]], shape: Sequence[int]) -> Tensor:
    """The tensor of `shape` with each part at its start index. Raises ValueError unless they tile it exactly."""
    shape = tuple(shape)
    pieces: list[Piece] = []
    for start, part in parts:
        if any(a < 0 or a + n > total for a, n, total in zip(start, part.shape, shape, strict=True)):
            raise ValueError(f"a part of shape {list(part.shape)} at {list(start)} lies outside of {list(shape)}")
        pieces += [replace(p, start=tuple(a + b for a, b in zip(p.start, start, strict=True))) for p in part.pieces]
    covered = sum(math.prod(piece.shape) for piece in pieces)
    if covered != math.prod(shape):
        raise ValueError(f"its parts hold {covered} elements, its shape {list(shape)} has {math.prod(shape)}")
    if len({piece.start for piece in pieces}) != len(pieces):
        raise ValueError("two of its parts lie in the same place")
    return Tensor(shape, parts[0][1].dtype, tuple(sorted(pieces, key=lambda piece: piece.start)))


def _moved(piece: Piece, dim: int, by: int) -> Piece:
    return replace(piece, start=tuple(a + by if d == dim else a for d, a in enumerate(piece.start)))


def _joined(pieces: list[Piece], dim: int) -> tuple[Piece, ...]:
    """The pieces with neighbours that lie next to each other in their file made one: cutting and joining again
    must not leave a tensor in crumbs."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if (
            last is not None
            and isinstance(piece.source, Path)
            and last.source == piece.source
            and last.strides == piece.strides
            and last.dtype == piece.dtype
            and last.end[dim] == piece.start[dim]
            and all(
                d == dim or (last.start[d], last.shape[d]) == (piece.start[d], piece.shape[d])
                for d in range(len(piece.shape))
            )
            and last.offset + last.shape[dim] * last.strides[dim] * ITEM_SIZES[piece.dtype] == piece.offset
        ):
            longer = tuple(n + piece.shape[dim] if d == dim else n for d, n in enumerate(last.shape))
            result[-1] = replace(last, shape=longer)
        else:
            result.append(piece)
    return tuple(result)


def _unsqueeze(tensor: Tensor) -> Tensor:
    # The stride of the new dimension is what it would be if the next tensor followed in the file.
    pieces = tuple(
        replace(piece, start=(0, *piece.start), shape=(1, *piece.shape), strides=(tensor.size, *piece.strides))
        for piece in tensor.pieces
    )
    return Tensor((1, *tensor.shape), tensor.dtype, pieces)
