"""A pickle can run code when it is loaded; here none does."""

import argparse
import contextlib
import os
import pickle
import pickletools
from pathlib import Path

import pytest
import torch

from converters import convert, pickles, torchfile
from converters.pickles import ForeignPickle, Inert
from hybrid.errors import UserError


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.marker}",)


def test_foreign_code_is_refused_by_name_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"model": {}, "args": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(ForeignPickle, match=r"posix\.system.*--allow-pickle posix\.system"):
        torchfile.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_allowed_names_are_read_past_but_still_not_run(tmp_path: Path) -> None:
    torch.save({"model": {}, "args": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    content = torchfile.load(tmp_path / "evil.pt", allow=["posix.system"])
    assert isinstance(content["args"], Inert) and not (tmp_path / "ran").exists()


def test_a_checkpoint_with_foreign_code_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000001" / "mp_rank_00"
    folder.mkdir(parents=True)
    torch.save({"model": {}, "args": Evil(tmp_path / "ran")}, folder / "model_optim_rng.pt")
    with pytest.raises(ForeignPickle, match=r"model_optim_rng\.pt names posix\.system"):
        convert.open_checkpoint(folder.parent)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("opcode", ["reduce", "newobj", "build"])
def test_no_way_of_making_an_object_runs_anything(tmp_path: Path, opcode: str) -> None:
    marker = tmp_path / "ran"
    call = b"cos\nsystem\n(V" + f"touch {marker}".encode() + b"\ntR"
    data = {
        "reduce": call + b".",
        "newobj": b"\x80\x02csubprocess\nPopen\n(V" + f"touch {marker}".encode() + b"\nt\x81.",
        "build": b"\x80\x02cargparse\nNamespace\n)\x81}V__class__\n" + call + b"sb.",
    }[opcode]
    pickletools.dis(data, out=open(os.devnull, "w"))  # noqa: SIM115
    with pytest.raises(ForeignPickle):
        pickles.load(data, "test")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["cargparse\nNamespace\n", "ctorch._utils\n_rebuild_tensor_v2\n"])
@pytest.mark.parametrize("attribute", ["__init__", "__defaults__", "marked"])
def test_what_a_pickle_names_cannot_be_changed_by_it(name: str, attribute: str) -> None:
    data = b"\x80\x02(" + name.encode() + b"N}X" + len(attribute).to_bytes(4, "little") + attribute.encode()
    data += b"cio\nBytesIO\ns\x86bl."  # [name with state (None, {attribute: BytesIO})]
    before = vars(argparse.Namespace).copy()
    with contextlib.suppress(UserError):
        pickles.load(data, "test")
    assert vars(argparse.Namespace) == before
    assert pickles.load(pickle.dumps(argparse.Namespace(a=1), protocol=2), "test").a == 1


def test_what_megatron_stores_is_known(tmp_path: Path) -> None:
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    args = argparse.Namespace(
        backend=AttnBackend.auto, kind=ModelType.encoder_or_decoder, path=Path("/x"), dtype=torch.half
    )
    torch.save({"args": args}, tmp_path / "x.pt")
    content = torchfile.load(tmp_path / "x.pt")
    assert content["args"].backend.name == "AttnBackend"
    back = pickle.loads(pickles.dump(content["args"]))
    assert back == args


def test_a_damaged_pickle_says_so() -> None:
    with pytest.raises(UserError, match="here is damaged"):
        pickles.load(b"\x80\x02]q\x00(K", "here")
