"""Files of torch.save: what torch writes is read here, what is planned here is read by torch."""

import argparse
import io
import zipfile
from pathlib import Path

import pytest
import torch

from converters import output, torchfile
from converters.streams import Reader
from hybrid.errors import UserError


def written(folder: Path, value: object) -> Path:
    output.write(folder, {"new.pt": torchfile.plan(value)})
    return folder / "new.pt"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bytes(a.contiguous().untyped_storage())
        == bytes(b.clone(memory_format=torch.contiguous_format).untyped_storage())
    )


CASES = {
    "matrix": torch.randn(5, 7).bfloat16(),
    "view with an offset": torch.randn(9, 6)[2:7, 1:4],
    "transposed": torch.randn(4, 3).t(),
    "parameter": torch.nn.Parameter(torch.randn(3)),
    "number": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "bool": torch.tensor([True, False, True]),
    "float8": torch.randn(8).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    value = CASES[name].detach()
    torch.save({"x": CASES[name]}, tmp_path / "old.pt")
    tensor = torchfile.load(tmp_path / "old.pt")["x"]
    with Reader() as reader:
        assert same(reader.tensor(tensor), value)
    back = torch.load(written(tmp_path, {"x": tensor}), weights_only=True)["x"]
    assert same(back, value)


def test_nested_objects_and_names(tmp_path: Path) -> None:
    args = argparse.Namespace(a=1, dtype=torch.bfloat16, sizes=torch.Size([2, 3]), text="x", flag=None)
    torch.save({"args": args, "list": [1, (2.5, "y")]}, tmp_path / "old.pt")
    back = torch.load(written(tmp_path, torchfile.load(tmp_path / "old.pt")), weights_only=False)
    assert type(back["args"]) is argparse.Namespace and back["args"] == args and back["list"] == [1, (2.5, "y")]


def test_a_shared_tensor_is_stored_once(tmp_path: Path) -> None:
    torch.save(torch.randn(1000), tmp_path / "old.pt")
    tensor = torchfile.load(tmp_path / "old.pt")
    assert written(tmp_path, {"a": tensor, "b": tensor}).stat().st_size < 6000


def test_other_readers_accept_the_file(tmp_path: Path) -> None:
    torch.save({"x": torch.randn(100)}, tmp_path / "old.pt")
    path = written(tmp_path, torchfile.load(tmp_path / "old.pt"))
    assert zipfile.ZipFile(path).testzip() is None
    torch.load(path, mmap=True, weights_only=True)
    for part in torchfile.plan(torchfile.load(tmp_path / "old.pt")).parts:
        assert part.offset % torchfile.ALIGNMENT == 0


def test_files_beyond_four_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The long form of the zip format, which storages of more than 4 GiB need, is taken from a lower limit on here."""
    monkeypatch.setattr(torchfile, "_LIMIT32", 300)
    value = {"small": torch.arange(10), "large": torch.randn(500), "after": torch.arange(3)}
    torch.save(value, tmp_path / "old.pt")
    path = written(tmp_path, torchfile.load(tmp_path / "old.pt"))
    monkeypatch.undo()
    back = torch.load(path, weights_only=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in value.items())
    assert torchfile.load(path)["large"].shape == (500,)


def test_a_file_inside_a_file(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save(torch.arange(5), inner)
    (tmp_path / "outer").write_bytes(b"before" + inner.getvalue() + b"after")
    tensor = torchfile.load(tmp_path / "outer", (), 6, len(inner.getvalue()))
    with Reader() as reader:
        assert reader.tensor(tensor).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 the rest is missing", "truncated"),
        (b"something else", "not a file of torch.save"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
    ],
)
def test_what_is_no_such_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        torchfile.load(tmp_path / "x.pt")
