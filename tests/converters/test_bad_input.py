"""What people have: missing, damaged and contradictory files; a full disk. One sentence each, and nothing is lost."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converters import convert, output, safefile
from hybrid.errors import CheckpointError, ConfigError, UserError

Saved = Callable[..., tuple[Path, dict[str, torch.Tensor]]]
Error = (UserError, ConfigError)


@pytest.fixture
def sharded(saved: Saved, tmp_path: Path) -> Path:
    """A legacy checkpoint over 2 x 2 ranks."""
    convert.convert(saved("hybrid")[0], tmp_path / "sharded", "megatron", tensor=2, pipeline=2)
    return tmp_path / "sharded"


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def rank(folder: Path, name: str) -> Path:
    return folder / "iter_0000100" / name / "model_optim_rng.pt"


def test_a_missing_rank(sharded: Path) -> None:
    shutil.rmtree(rank(sharded, "mp_rank_01_001").parent)
    with pytest.raises(UserError, match=r"lacks mp_rank_01_001 of a checkpoint that is tensor 2 x pipeline 2"):
        convert.open_checkpoint(sharded)


def test_the_last_ranks_are_missed_by_the_arguments(sharded: Path) -> None:
    for name in ("mp_rank_01_000", "mp_rank_01_001"):
        shutil.rmtree(rank(sharded, name).parent)
    with pytest.raises(UserError, match=r"lacks mp_rank_01_000, mp_rank_01_001"):
        convert.open_checkpoint(sharded)


def test_a_rank_folder_without_its_file(sharded: Path) -> None:
    rank(sharded, "mp_rank_01_001").unlink()
    with pytest.raises(UserError, match=r"mp_rank_01_001/model_optim_rng.pt is missing"):
        convert.open_checkpoint(sharded)


@pytest.mark.parametrize("left", [0, 1000, -3000])
def test_a_truncated_file(sharded: Path, left: int) -> None:
    path = rank(sharded, "mp_rank_01_000")
    os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    with pytest.raises(UserError, match=r"mp_rank_01_000/model_optim_rng.pt is (truncated|not a file of torch.save)"):
        convert.open_checkpoint(sharded)


def test_ranks_that_disagree(sharded: Path) -> None:
    def shorten(content: dict[str, Any]) -> None:
        content["model"]["decoder.layers.0.mixer.D"] = torch.zeros(4, dtype=torch.bfloat16)

    edit(rank(sharded, "mp_rank_01_000"), shorten)
    with pytest.raises(UserError, match=r"disagree: decoder.layers.0.mixer.D is \[4\] bfloat16 in one, \[8\]"):
        convert.open_checkpoint(sharded)
    edit(rank(sharded, "mp_rank_01_000"), lambda content: content["model"].pop("decoder.layers.0.mixer.D"))
    with pytest.raises(UserError, match=r"disagree: only one of them has decoder.layers.0.mixer.D"):
        convert.open_checkpoint(sharded)


def test_ranks_of_different_iterations(sharded: Path) -> None:
    edit(rank(sharded, "mp_rank_00_001"), lambda content: content.update(iteration=99))
    with pytest.raises(UserError, match=r"different iterations: (99, 100|100, 99)"):
        convert.open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"model.hidden_size: is said to be 64, but the tensors are of 32"),
        (
            {"num_attention_heads": 4, "kv_channels": 16},
            r"model.num_query_groups: is said to be 2, but the tensors are of 1",
        ),
        ({"hybrid_layer_pattern": "M-M-*"}, r"is said to be 'M-M-\*', but the tensors are of 'M-M\*-'"),
        ({"mamba_state_dim": 3}, r"model.mamba_state_dim: is said to be 3, but mixer.conv1d.weight has 32 rows for B"),
        (
            {"mamba_state_dim": 8},
            "model.mamba_state_dim: is said to be 8, and mamba_num_groups 8, but mixer.conv1d.weight has 32 rows for B",
        ),
    ],
)
def test_a_shape_that_contradicts_the_arguments(
    tmp_path: Path, make_model: Any, make_weights: Any, make_legacy: Any, changes: dict[str, Any], message: str
) -> None:
    model = make_model("hybrid")
    source = make_legacy(tmp_path / "source", model, make_weights(model), **changes)
    with pytest.raises(ConfigError, match=message):
        convert.open_checkpoint(source)


def test_a_vocabulary_larger_than_the_embedding_is_not_cut_in_silence(saved: Saved) -> None:
    source, _ = saved("hybrid")
    assert convert.open_checkpoint(source, {"vocab_size": 256}).model.vocab_size == 256
    with pytest.raises(ConfigError, match=r"model.vocab_size: is said to be 257, but the embedding has 256 rows"):
        convert.open_checkpoint(source, {"vocab_size": 257})


@pytest.mark.parametrize("strange", [float("nan"), float("inf")])
def test_a_value_that_float16_does_not_reach(
    tmp_path: Path, make_model: Any, make_weights: Any, make_legacy: Any, strange: float
) -> None:
    """65504 is the largest value of float16, to which all below 65520 are rounded. What is infinite may stay so."""
    model = make_model("hybrid")
    weights = make_weights(model, dtype=torch.float32)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    weights[name][0, 0] = strange
    for value, rounded in ((65519.0, 65504.0), (-65520.0, None)):
        weights[name][1, 1] = value
        out = tmp_path / f"out{value}"
        source = make_legacy(tmp_path / f"source{value}", model, weights)
        if rounded is None:
            said = rf"--dtype: is float16, in which {name} would become infinite: .* up to 65520; write bfloat16"
            with pytest.raises(ConfigError, match=said):
                convert.convert(source, out, "hf", dtype="float16", verify=True)
            assert not out.exists()
            convert.convert(source, out, "hf", dtype="bfloat16")
        else:
            convert.convert(source, out, "hf", dtype="float16", verify=True)
            assert dict(convert.stream(out))[name][1, 1] == rounded


def test_arguments_that_say_nothing(tmp_path: Path, make_model: Any, make_weights: Any, make_legacy: Any) -> None:
    """Shapes tell the most; what they leave open is assumed, said to be, and can be stated."""
    model = make_model("hybrid", mamba_state_dim=128, hidden_size=64)
    source = make_legacy(tmp_path / "source", model, make_weights(model))
    edit(source / "iter_0000100/mp_rank_00/model_optim_rng.pt", lambda content: content.pop("args"))
    opened = convert.open_checkpoint(source)
    assert opened.model.layer_pattern == "M-M*-" and opened.model.mamba_num_groups == 8
    assert [note.split("=")[0] for note in opened.assumed] == ["mamba_state_dim", "attention_head_dim", "activation"]
    stated = convert.open_checkpoint(source, {"attention_head_dim": 8, "activation": "squared_relu"})
    assert stated.model.num_attention_heads == 8 and len(stated.assumed) == 1


def test_an_unknown_tensor_is_named_with_the_nearest(
    tmp_path: Path, make_model: Any, make_weights: Any, make_legacy: Any
) -> None:
    model = make_model("hybrid")
    weights = make_weights(model) | {"decoder.layers.0.mixer.A_logg": torch.zeros(3)}
    source = make_legacy(tmp_path / "source", model, weights)
    opened = convert.open_checkpoint(source)
    assert list(opened.unknown) == ["decoder.layers.0.mixer.A_logg"]
    with pytest.raises(UserError, match=r"A_logg is unknown; did you mean decoder.layers.0.mixer.A_log"):
        convert.convert(opened, tmp_path / "out", "megatron")


def test_a_missing_tensor_is_named(tmp_path: Path, make_model: Any, make_weights: Any, make_legacy: Any) -> None:
    model = make_model("hybrid")
    weights = make_weights(model)
    del weights["decoder.layers.2.mixer.D"]
    source = make_legacy(tmp_path / "source", model, weights)
    with pytest.raises(UserError, match=r"decoder.layers.2.mixer.D is missing"):
        convert.convert(source, tmp_path / "out", "megatron")


@pytest.mark.parametrize("name", ["self_attention.core_attention.indexer.linear_wk.weight", "self_attention.A_log"])
def test_a_layer_of_another_kind(
    tmp_path: Path, make_model: Any, make_weights: Any, make_legacy: Any, name: str
) -> None:
    model = make_model("hybrid")
    weights = make_weights(model) | {f"decoder.layers.5.{name}": torch.zeros(3)}
    source = make_legacy(tmp_path / "source", model, weights)
    with pytest.raises(
        UserError, match=r"decoder.layers.5 is (sparse|a gated).*know the layers Mamba \(M\), attention"
    ):
        convert.open_checkpoint(source)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is neither a run nor a checkpoint"):
        convert.open_checkpoint(tmp_path / "nothing")
    (tmp_path / "readme").write_text("hello")
    with pytest.raises(ConfigError, match=r"is no checkpoint: .*it holds readme"):
        convert.open_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="is no checkpoint of the format hf"):
        convert.open_checkpoint(f"hf:{tmp_path}")


def test_a_tracker_that_lies(sharded: Path) -> None:
    (sharded / "latest_checkpointed_iteration.txt").write_text("200")
    with pytest.raises(UserError, match=r"says '200', but there is no folder .*iter_0000200"):
        convert.open_checkpoint(sharded)


def test_the_destination_exists(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert.convert(sharded, tmp_path / "out", "megatron")  # an empty folder is taken
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(ConfigError, match="exists already"):
        convert.convert(tmp_path / "nothing", tmp_path / "out", "hf")  # said before the source is looked at
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_a_destination_that_cannot_be_made(sharded: Path, tmp_path: Path) -> None:
    """The folders above it that were made for it are gone again."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/out cannot be written: Not a directory; name another destination"):
        convert.convert(sharded, tmp_path / "file/out", "megatron")
    for long in (250, 300):  # of 255 bytes that a name may have, some are added while it is written
        with pytest.raises(ConfigError, match=r"cannot be written: File name too long"):
            convert.convert(sharded, tmp_path / "some/where" / ("x" * long), "megatron")
    assert not (tmp_path / "some").exists()


def test_folders_made_for_a_destination_do_not_stay_without_it(sharded: Path, tmp_path: Path) -> None:
    def interrupt(progress: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert.convert(sharded, tmp_path / "there/some/where/out", "megatron", report=interrupt)
    assert list((tmp_path / "there").iterdir()) == []
    convert.convert(sharded, tmp_path / "there/some/where/out", "megatron")


def test_a_source_that_cannot_be_read_is_named_and_not_the_destination(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert.convert(saved("hybrid")[0], tmp_path / "a", "hf")
    (tmp_path / "a/tokenizer.model").write_text("")
    opened = convert.open_checkpoint(tmp_path / "a")
    (tmp_path / "a/tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"a/tokenizer.model cannot be read: No such file or directory"):
        convert.convert(opened, tmp_path / "out", "torch_dist")

    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CheckpointError, match=r"a/model.safetensors cannot be read: Input/output error"):
        convert.convert(tmp_path / "a", tmp_path / "out", "torch_dist")
    assert not (tmp_path / "out").exists()


def test_the_files_that_are_read_count_towards_those_open_at_once(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks are read; the tracker and one rank are written."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(output.resource, "setrlimit", lambda _, limits: asked.append(limits))
    monkeypatch.setattr(output.resource, "getrlimit", lambda _: (0, 1000))
    convert.convert(sharded, tmp_path / "out", "megatron")
    assert asked == [(4 + 2 + output._OTHER_FILES, 1000)]
    monkeypatch.setattr(output.resource, "getrlimit", lambda _: (0, 5))
    with pytest.raises(
        UserError, match="4 files to read and 2 to write are open at once, but the limit is 5; raise it"
    ):
        convert.convert(sharded, tmp_path / "other", "megatron")


def test_a_disk_that_is_too_small(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        output.shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and type("D", (), {"free": 10})
    )
    with pytest.raises(UserError, match=r"needs 0.00 GB, but the disk .* has 0.00 GB left"):
        convert.convert(sharded, tmp_path / "out", "megatron")
    assert not (tmp_path / "out").exists()


def test_a_disk_full_half_way(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, real = 0, os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"the disk is full; .*out was not written, nothing was left behind"):
        convert.convert(sharded, tmp_path / "out", "megatron")
    assert sorted(tmp_path.iterdir()) == before


def test_an_interruption_leaves_nothing(sharded: Path, tmp_path: Path) -> None:
    def interrupt(progress: object) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert.convert(sharded, tmp_path / "out", "megatron", report=interrupt)
    assert sorted(tmp_path.iterdir()) == before


def test_verify_finds_what_did_not_reach_the_disk(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        return real(descriptor, bytes(len(data)) if len(data) > 2000 else data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(UserError, match=r"model_optim_rng.pt read back differently than written; .* was not kept"):
        convert.convert(sharded, tmp_path / "out", "megatron", verify=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["megatron", "torch_dist"])
def test_verify_finds_what_is_written_last(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """The headers and the index of an archive, without which torch reads nothing of it."""
    real = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        return real(descriptor, bytes(len(data)) if bytes(data[:4]) == b"PK\x01\x02" else data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(UserError, match=r"read back differently than written; .* was not kept"):
        convert.convert(sharded, tmp_path / "out", to, verify=True)
    assert not (tmp_path / "out").exists()


def test_a_torch_dist_file_is_missing_or_truncated(saved: Saved, tmp_path: Path) -> None:
    convert.convert(saved("hybrid")[0], tmp_path / "a", "torch_dist", tensor=2)
    path = tmp_path / "a/iter_0000100/__1_0.distcp"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(UserError, match=r"__1_0.distcp is truncated"):
        convert.open_checkpoint(tmp_path / "a")
    path.unlink()
    with pytest.raises(UserError, match=r"__1_0.distcp is missing"):
        convert.open_checkpoint(tmp_path / "a")


def test_the_newest_checkpoint_of_a_run_is_damaged(saved: Saved, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run/checkpoints"
    convert.convert(saved("hybrid")[0], checkpoints, "torch_dist")
    shutil.copytree(checkpoints / "iter_0000100", checkpoints / "iter_0000200")
    (checkpoints / "iter_0000200/__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__0_0.distcp is missing; the run's checkpoint before it is .*iter_0000100"):
        convert.open_checkpoint(tmp_path / "run")
    shutil.rmtree(checkpoints / "iter_0000100")
    with pytest.raises(UserError, match=r"__0_0.distcp is missing$"):
        convert.open_checkpoint(tmp_path / "run")


def test_hf_files_that_do_not_fit(saved: Saved, tmp_path: Path) -> None:
    convert.convert(saved("hybrid")[0], tmp_path / "a", "hf")
    weights = tmp_path / "a/model.safetensors"
    os.truncate(weights, weights.stat().st_size - 10)
    with pytest.raises(UserError, match=r"model.safetensors is truncated"):
        convert.open_checkpoint(tmp_path / "a")
    weights.unlink()
    (tmp_path / "a/model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(UserError, match=r"model-1.safetensors is missing"):
        convert.open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("[1]", "is no safetensors file, or its header is damaged"),
        ('{"a": {"dtype": "F32"}}', "its header is damaged at the tensor a"),
        ('{"a": 3}', "its header is damaged at the tensor a"),
        (
            '{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}',
            "a has the number format F4, which is not read",
        ),
    ],
)
def test_a_damaged_safetensors_header(tmp_path: Path, header: str, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(UserError, match=says):
        safefile.load(path)


MOE = {"hybrid_override_pattern": None, "layers_block_type": ["moe"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": "abc"}, "vocab_size: is 'abc' in config.json, but must be a whole number of at least 1"),
        ({"head_dim": 0}, "head_dim: is 0 in config.json, but must be a whole number of at least 1"),
        ({"layers_block_type": 5}, "layers_block_type: is 5 in config.json, but must be a list"),
        ({"model_type": []}, r"model_type: is \[\] in config.json, but must be a text"),
        ({"rope_parameters": "abc"}, "rope_parameters: is 'abc' in config.json, but must be an object"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_parameters.rope_theta: is 'big' in config.json"),
        ({"num_experts_per_tok": "2"}, "num_experts_per_tok: is '2' in config.json, but must be a whole number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: is 'no' in config.json, but must be True or False"),
        ({"vocab_size": True, "chunk_size": 1.5}, "vocab_size: is True .*\nchunk_size: is 1.5"),
        ({**MOE, "n_routed_experts": None}, "n_routed_experts: is None in config.json, but there are MoE layers"),
        (
            {"hybrid_override_pattern": "MG"},
            r"layer pattern: has G; models of Hugging Face are read with M, \*, - and E",
        ),
        ({"model_type": None, "n_layer": None, "d_model": 8}, "config.json: does not say what layers the model has"),
        ({"num_attention_heads": 0, "head_dim": 8}, "model.num_attention_heads: is 0, but must be at least 1"),
    ],
)
def test_a_config_json_of_wrong_values(saved: Saved, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    convert.convert(saved("hybrid")[0], tmp_path / "a", "hf")
    path = tmp_path / "a/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        convert.open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    "index", ['{"weight_map": {"a": 5}}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": []}', "[]"]
)
def test_a_damaged_index(saved: Saved, tmp_path: Path, index: str) -> None:
    convert.convert(saved("hybrid")[0], tmp_path / "a", "hf")
    (tmp_path / "a/model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index.json is damaged: it does not name a file for each tensor"):
        convert.open_checkpoint(tmp_path / "a")


def test_a_pickle_without_tensors_and_a_block_that_nobody_knows(saved: Saved, tmp_path: Path) -> None:
    convert.convert(saved("hybrid")[0], tmp_path / "a", "hf")
    config = json.loads((tmp_path / "a/config.json").read_text())
    for blocks in (["mamba", "perceptron"], [["mamba"]]):
        strange = {**config, "hybrid_override_pattern": None, "layers_block_type": blocks}
        (tmp_path / "a/config.json").write_text(json.dumps(strange))
        with pytest.raises(ConfigError, match=r"layers_block_type: has .*; the known ones are linear_attention"):
            convert.open_checkpoint(tmp_path / "a")
    (tmp_path / "a/model.safetensors").unlink()
    torch.save([1, 2], tmp_path / "a/pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin holds a list, not tensors by name"):
        convert.open_checkpoint(tmp_path / "a")
