"""Lazy tensors behave as NumPy's arrays do, whatever is done to them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import streams
from converters.streams import Reader
from converters.tensors import Flat, Tensor, cast, cat, narrow, place, reshape, select, split, stack, stored, zeros


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("tensors") / "numbers"
    values = np.arange(4 * 6 * 5, dtype=np.uint32).reshape(4, 6, 5)
    path.write_bytes(b"head" + values.tobytes())
    return path, values


def pair(numbers: tuple[Path, np.ndarray]) -> tuple[Tensor, np.ndarray]:
    return stored(numbers[0], 4, (4, 6, 5), "int32"), numbers[1]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sequence_of_operations(numbers: tuple[Path, np.ndarray], data: st.DataObject) -> None:
    tensor, array = pair(numbers)
    for _ in range(data.draw(st.integers(1, 6))):
        dim = data.draw(st.integers(0, array.ndim - 1))
        operation = data.draw(st.sampled_from(["narrow", "cat", "shuffle", "stack", "pad"]))
        if operation == "narrow" and array.shape[dim] > 1:
            start = data.draw(st.integers(0, array.shape[dim] - 1))
            length = data.draw(st.integers(1, array.shape[dim] - start))
            tensor, array = narrow(tensor, dim, start, length), array.take(range(start, start + length), dim)
        elif operation == "cat" and array.size < 2000:
            tensor, array = cat([tensor, tensor], dim), np.concatenate([array, array], dim)
        elif operation == "shuffle":
            half = array.shape[dim] // 2
            parts = split(tensor, dim, [half, array.shape[dim] - half])
            tensor, array = cat(parts[::-1], dim), np.roll(array, -half, dim)
        elif operation == "stack" and array.ndim < 5 and array.size < 2000:
            tensor, array = stack([tensor, tensor]), np.stack([array, array])
            if data.draw(st.booleans()):
                tensor, array = select(tensor, 1), array[1]
        elif operation == "pad":
            extra = [2 if d == dim else n for d, n in enumerate(array.shape)]
            tensor = cat([tensor, zeros(extra, "int32")], dim)
            array = np.concatenate([array, np.zeros(extra, array.dtype)], dim)
    with Reader() as reader:
        assert tensor.shape == array.shape
        assert np.array_equal(reader.array(tensor), array)
        size = data.draw(st.sampled_from([4, 12, 60, 1 << 20]))
        assert b"".join(map(bytes, reader.blocks(tensor, size))) == array.tobytes()


def test_cutting_and_joining_leaves_one_piece(numbers: tuple[Path, np.ndarray]) -> None:
    tensor, _ = pair(numbers)
    assert cat(split(tensor, 1, [2, 3, 1]), 1) == tensor


def test_flat_is_all_parts_in_a_row(numbers: tuple[Path, np.ndarray]) -> None:
    tensor, array = pair(numbers)
    flat = Flat((narrow(tensor, 1, 0, 2), zeros((3,), "int32")), "int32")
    with Reader() as reader:
        assert b"".join(map(bytes, reader.blocks(flat))) == array[:, :2].tobytes() + bytes(12)


def test_reshape_of_a_run(numbers: tuple[Path, np.ndarray]) -> None:
    tensor, array = pair(numbers)
    with Reader() as reader:
        assert np.array_equal(reader.array(reshape(narrow(tensor, 0, 1, 2), (5, 12))), array[1:3].reshape(5, 12))


@pytest.mark.parametrize(("parts", "message"), [([(0, 2)], "hold 60 elements"), ([(0, 2), (0, 2)], "the same place")])
def test_parts_must_tile(numbers: tuple[Path, np.ndarray], parts: list[tuple[int, int]], message: str) -> None:
    tensor, _ = pair(numbers)
    with pytest.raises(ValueError, match=message):
        place([((start, 0, 0), narrow(tensor, 0, start, length)) for start, length in parts], tensor.shape)


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_number_formats_change_as_torch_changes_them(tmp_path: Path, source: str, target: str) -> None:
    values = (torch.randn(1000, dtype=torch.float64) * 100).to(getattr(torch, source))
    (tmp_path / "x").write_bytes(values.view(torch.uint8).numpy().tobytes())
    tensor = stored(tmp_path / "x", 0, (1000,), source)
    with Reader() as reader:
        assert torch.equal(reader.tensor(cast(tensor, target)), values.to(getattr(torch, target)))


@settings(max_examples=100)
@given(st.lists(st.integers(1, 7), max_size=4).map(tuple), st.integers(1, 50))
def test_boxes_cover_a_shape_in_order(shape: tuple[int, ...], limit: int) -> None:
    index = np.arange(int(np.prod(shape))).reshape(shape)
    seen: list[int] = []
    for start, size in streams.boxes(shape, limit):
        part = index[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))].ravel()
        assert part.size <= max(limit, 1)
        seen += part.tolist()
    assert seen == list(range(index.size))
