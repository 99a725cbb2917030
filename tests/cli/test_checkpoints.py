"""`inspect` and `convert`: facts on stdout, one sentence per mistake on stderr."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cli import main
from converters import naming, output
from hybrid.config import ModelConfig

Hybrid = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hybrid(capsys: pytest.CaptureFixture[str]) -> Hybrid:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main.run(list(arguments))
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A legacy checkpoint without arguments, as somebody was handed it."""
    model = ModelConfig(
        layer_pattern="M-*",
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        mamba_head_dim=8,
        mamba_num_heads=8,
        mamba_num_groups=2,
        mamba_state_dim=128,
        vocab_size=256,
    )
    weights = {name: torch.randn(param.shape) for name, param in naming.parameters(model).items()}
    folder = tmp_path / "handed" / "release" / "mp_rank_00"
    folder.mkdir(parents=True)
    torch.save({"model": weights}, folder / "model_optim_rng.pt")
    (tmp_path / "handed/latest_checkpointed_iteration.txt").write_text("release")
    return tmp_path / "handed"


def test_two_commands_from_an_unknown_folder_to_hugging_face(hybrid: Hybrid, checkpoint: Path, tmp_path: Path) -> None:
    code, out, err = hybrid("inspect", str(checkpoint))
    assert (code, err) == (0, "")
    assert "layer pattern  M-*" in out and "assumed        mamba_state_dim=128 and mamba_num_groups=2" in out
    code, out, err = hybrid("convert", str(checkpoint), str(tmp_path / "hf"), "attention_head_dim=8", "--to", "hf")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'hf'}: hf, 3 files, ")
    code, out, _ = hybrid("inspect", str(tmp_path / "hf"), "--json")
    assert json.loads(out)["family"] == "nemotron_h" and json.loads(out)["model"]["num_attention_heads"] == 4


def test_tensors_and_json(hybrid: Hybrid, checkpoint: Path) -> None:
    out = hybrid("inspect", str(checkpoint), "--tensors")[1]
    assert "\ndecoder.layers.0.mixer.A_log " in out and "[648, 32]" in out  # 2 x 64 + 2 x 2 x 128 + 8 rows
    facts = json.loads(hybrid("inspect", str(checkpoint), "--tensors", "--json")[1])
    assert facts["shapes"]["embedding.word_embeddings.weight"] == [[256, 32], "float32"]


def test_diff_tells_by_its_exit_code(hybrid: Hybrid, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("attention_head_dim=8", "model.activation=squared_relu")
    hybrid("convert", str(checkpoint), str(tmp_path / "a"), *arguments, "--to", "megatron", "--tensor-parallel", "2")
    code, out, _ = hybrid("inspect", str(checkpoint), *arguments, "--diff", str(tmp_path / "a"))
    assert (code, out) == (0, "no difference\n")
    hybrid("convert", str(checkpoint), str(tmp_path / "b"), *arguments, "--dtype", "bfloat16")
    code, out, _ = hybrid("inspect", str(checkpoint), *arguments, "--diff", str(tmp_path / "b"))
    assert code == 1 and "output_layer.weight: float32 / bfloat16" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "nothing-here"], 2, "nothing-here: is neither a run nor a checkpoint folder"),
        (["convert", "{}", "{}/out"], 2, "lies in the source"),
        (["convert", "{}", "{}"], 2, "exists already; name another destination, or remove it"),
        (["convert", "{}", "{}/latest_checkpointed_iteration.txt/out"], 2, "lies in the source"),
        (
            ["convert", "{}", "{}-out", "--to", "onnx"],
            2,
            "--to: is 'onnx', which is not one of torch_dist, megatron, hf",
        ),
        (["convert", "{}", "{}-out", "--to", "megatron", "--tensor-parallel", "4"], 2, "mamba_num_groups"),
        (["convert", "{}", "{}-out", "--to", "hf", "--tensor-parallel", "2"], 2, "hf has no parallel layout"),
        (["convert", "{}", "{}-out", "--to", "hf", "--layer-pattern", "M|-*"], 2, "--layer-pattern: says where"),
        (["convert", "{}", "{}-out", "--family", "bamba"], 2, "--family: is one of Hugging Face's; leave it out, or"),
        (["convert", "{}", "{}-out", "--to", "megatron", "--family", "mamba2"], 2, "write --to hf and not megatron"),
        (
            ["convert", "{}", "{}-out", "--separate-norms"],
            2,
            "--separate-norms: gives names of --to megatron, and torch_",
        ),
        (["convert", "{}", "{}-out", "--dtype", "int8"], 2, "--dtype: is 'int8'"),
        (["convert", "{}", "{}-out", "--optimizer"], 2, "has no optimizer state"),
        (["inspect", "{}", "hidden=3"], 2, "hidden=3: is no field=value of the model"),
        (
            ["convert", "{}", "{}-out", "--to", "hf", "--family", "llama"],
            2,
            "--family: is 'llama', which is not one of",
        ),
        (["inspect", "{}", "vocab_size=0"], 2, "model.vocab_size: is 0, but must be at least 1"),
        (["inspect", "{}", "vocab_size=-1"], 2, "model.vocab_size: is -1, but must be at least 1"),
        (["inspect", "{}", "mamba_state_dim=0"], 2, "model.mamba_state_dim: is 0, but must be at least 1"),
        (["inspect", "{}", "attention_head_dim=0"], 2, "model.attention_head_dim: is 0, but must be at least 1"),
        (["inspect", "{}", "mamba_state_dim=big"], 2, "mamba_state_dim: 'big' is not a whole number"),
    ],
)
def test_mistakes(hybrid: Hybrid, checkpoint: Path, arguments: list[str], code: int, message: str) -> None:
    found, out, err = hybrid(*(argument.format(checkpoint) for argument in arguments))
    assert (found, out) == (code, "")
    assert message in err and "Traceback" not in err


def test_files_that_are_missing_or_damaged_are_a_wrong_argument(hybrid: Hybrid, checkpoint: Path) -> None:
    file = checkpoint / "release/mp_rank_00/model_optim_rng.pt"
    os.truncate(file, file.stat().st_size - 100)
    for verb in (["inspect", str(checkpoint)], ["convert", str(checkpoint), f"{checkpoint}-out"]):
        code, out, err = hybrid(*verb)
        assert (code, out) == (2, "") and "model_optim_rng.pt is truncated" in err
    file.unlink()
    code, out, err = hybrid("inspect", str(checkpoint))
    assert (code, out) == (2, "") and "model_optim_rng.pt is missing" in err


@pytest.mark.parametrize(("verb", "code"), [(["inspect", "{}"], 0), (["convert", "{}", "{}/.."], 2)])
def test_no_torch_is_imported_to_inspect_or_to_refuse(checkpoint: Path, verb: list[str], code: int) -> None:
    program = (
        "import atexit, sys; from cli import main; "
        "atexit.register(lambda: print('torch' in sys.modules)); main.run(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, *(word.format(checkpoint) for word in verb)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("False\n") and done.returncode == code


def test_progress_has_speed_and_time_left() -> None:
    text = str(output.Progress(done=2_000_000_000, total=8_000_000_000, seconds=4.0))
    assert text == "2.00 of 8.00 GB at 0.50 GB/s, 12 s left"
