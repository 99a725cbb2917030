"""What goes wrong with Megatron-LM's tools/checkpoint/hybrid_conversion.py, and does not here: a test for each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converters import convert, naming
from converters.streams import Reader
from hybrid.errors import ConfigError

Saved = Callable[..., tuple[Path, dict[str, torch.Tensor]]]


def same(path: Path, weights: dict[str, torch.Tensor]) -> None:
    back = dict(convert.stream(path))
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(back[name], weight), name


def rename(source: Path, change: Callable[[str], str]) -> None:
    """Rename the tensors of a checkpoint of one rank."""
    path = next(source.glob("*/mp_rank_00/model_optim_rng.pt"))
    content = torch.load(path, weights_only=False)
    content["model"] = {change(name): tensor for name, tensor in content["model"].items()}
    torch.save(content, path)


def test_dies_on_weights_only_loading(saved: Saved, tmp_path: Path) -> None:
    """torch 2.6 and later load without an explicit flag only what is on a list; the output is such a file, too."""
    source, weights = saved("hybrid")
    convert.convert(source, tmp_path / "out", "megatron", tensor=2)
    import argparse

    with torch.serialization.safe_globals([argparse.Namespace]):
        for path in (tmp_path / "out").rglob("*.pt"):
            torch.load(path, weights_only=True)
    same(tmp_path / "out", weights)


def test_unknown_tensor_for_fused_norms(saved: Saved, tmp_path: Path) -> None:
    """Both generations of names: the fused norm of today, the separate one of 2024."""
    source, weights = saved("hybrid")
    convert.convert(source, tmp_path / "today", "megatron", tensor=2)
    same(tmp_path / "today", weights)
    rename(source, lambda name: name.replace("mixer.in_proj.layer_norm_weight", "norm.weight"))
    convert.convert(source, tmp_path / "from-2024", "megatron", tensor=2)
    same(tmp_path / "from-2024", weights)


def test_unknown_tensor_for_conv1d_weight(saved: Saved, tmp_path: Path) -> None:
    """`conv1d_weight` is the live parameter since June 2026, `conv1d.weight` was the module's before."""
    source, weights = saved("mamba2")
    convert.convert(source, tmp_path / "today", "megatron", tensor=2)
    rename(source, lambda name: name.replace("conv1d_", "conv1d."))
    convert.convert(source, tmp_path / "from-before", "megatron", tensor=2)
    same(tmp_path / "today", weights)
    same(tmp_path / "from-before", weights)


def test_swiglu_fc1_silently_wrong(saved: Saved, tmp_path: Path) -> None:
    """Every rank holds its part of the gate and its part of the up projection, not half of them one of each."""
    source, weights = saved("swiglu")
    convert.convert(source, tmp_path / "out", "megatron", tensor=2)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    gate, up = weights[name].chunk(2)
    for rank in range(2):
        path = tmp_path / f"out/iter_0000100/mp_rank_{rank:02d}/model_optim_rng.pt"
        held = torch.load(path, weights_only=False)["model"][name]
        assert torch.equal(held, torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]]))


def test_uneven_pipeline_drops_the_last_layers(saved: Saved, tmp_path: Path) -> None:
    """5 layers over 2 and 3 stages: all of them, the final norm and the output layer."""
    source, weights = saved("hybrid")
    for stages in (2, 3):
        convert.convert(source, tmp_path / str(stages), "megatron", pipeline=stages)
        same(tmp_path / str(stages), weights)


def test_each_file_stores_the_unsliced_storage(saved: Saved, tmp_path: Path) -> None:
    source, _ = saved("hybrid", hidden_size=256, ffn_hidden_size=1024)
    convert.convert(source, tmp_path / "out", "megatron", tensor=4)
    files = list((tmp_path / "out").rglob("*.pt"))
    before = sum(path.stat().st_size for path in source.rglob("*.pt"))
    assert sum(path.stat().st_size for path in files) < 1.15 * before  # small tensors, so headers count
    for path in files:
        for tensor in torch.load(path, weights_only=False)["model"].values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_tied_embeddings_lose_the_output_layer(saved: Saved, tmp_path: Path) -> None:
    """On the last of several stages the output layer is a copy of the embedding."""
    source, weights = saved("tied")
    convert.convert(source, tmp_path / "out", "megatron", pipeline=2)
    last = torch.load(tmp_path / "out/iter_0000100/mp_rank_00_001/model_optim_rng.pt", weights_only=False)["model"]
    assert torch.equal(last["output_layer.weight"], weights[naming.EMBEDDING])
    assert list(last)[-1] == "output_layer.weight"
    same(tmp_path / "out", weights)


def test_release_tracker_raises(saved: Saved, tmp_path: Path) -> None:
    source, weights = saved("hybrid")
    (source / "iter_0000100").rename(source / "release")
    (source / "latest_checkpointed_iteration.txt").write_text("release")
    convert.convert(source, tmp_path / "out", "megatron", tensor=2)
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"
    same(tmp_path / "out", weights)


def test_more_ranks_than_groups_raises_index_error(saved: Saved, tmp_path: Path) -> None:
    source, _ = saved("mamba2")
    with pytest.raises(
        ConfigError, match=r"mamba_num_groups: is 8, but must be a multiple of --tensor-parallel \(16\)"
    ):
        convert.convert(source, tmp_path / "out", "megatron", tensor=16)
    assert not (tmp_path / "out").exists()


def test_inner_width_is_not_twice_the_hidden_size(saved: Saved, tmp_path: Path) -> None:
    source, weights = saved("mamba2", mamba_num_heads=24)
    assert convert.open_checkpoint(source).model.mamba_inner_size == 96  # hidden size 32
    convert.convert(source, tmp_path / "out", "megatron", tensor=8)
    same(tmp_path / "out", weights)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("swiglu", {"tensor": 2}),  # biases
        ("moe", {"tensor": 2, "expert": 2}),
        ("mtp", {"tensor": 2, "pipeline": 2}),
        ("hybrid", {"pipeline": 2, "layer_pattern": "M|-|M|*-"}),  # virtual stages
    ],
)
def test_no_biases_experts_mtp_or_virtual_stages(saved: Saved, tmp_path: Path, kind: str, layout: Any) -> None:
    source, weights = saved(kind)
    convert.convert(source, tmp_path / "out", "megatron", **layout)
    convert.convert(tmp_path / "out", tmp_path / "back", "megatron")
    same(tmp_path / "back", weights)


def test_fewer_key_value_heads_than_ranks(saved: Saved, tmp_path: Path) -> None:
    source, weights = saved("hybrid")
    convert.convert(source, tmp_path / "out", "megatron", tensor=8)
    opened = convert.open_checkpoint(tmp_path / "out")
    assert (opened.model.query_groups, opened.layout and opened.layout.tensor) == (2, 8)
    convert.convert(opened, tmp_path / "back", "megatron")
    same(tmp_path / "back", weights)


def test_vocabulary_is_not_padded_again(saved: Saved, tmp_path: Path) -> None:
    source, weights = saved("hybrid", vocab_size=250, vocab_size_multiple=2)
    convert.convert(source, tmp_path / "out", "megatron", tensor=8)
    assert convert.open_checkpoint(tmp_path / "out").tensors[naming.EMBEDDING].shape[0] == 256
    convert.convert(tmp_path / "out", tmp_path / "back", "megatron")
    same(tmp_path / "back", weights)


def test_the_whole_model_is_held_in_memory(saved: Saved) -> None:
    """A plan holds no weights: every tensor of it is still a place in the source's file."""
    source, _ = saved("hybrid")
    files = convert.planned(convert.open_checkpoint(source), "megatron", tensor=2)
    held = sum(len(part.content) for plan in files.values() for part in plan.parts if isinstance(part.content, bytes))
    assert held < 40_000


def test_drops_the_optimizer(saved: Saved, tmp_path: Path) -> None:
    """Plain Adam state of one rank, as Megatron numbers it; more, with Megatron's optimizers, in test_optimizer.py."""
    source, weights = saved("hybrid")
    path = source / "iter_0000100/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    groups = [[name for name, weight in weights.items() if (weight.dim() > 1) == decays] for decays in (True, False)]
    names = [name for group in groups for name in group]
    state = {
        number: {slot: torch.randn(weights[name].shape) for slot in ("exp_avg", "exp_avg_sq")}
        for number, name in enumerate(names)
    }
    originals = {name: weights[name].float() + torch.randn(weights[name].shape) / 1000 for name in names}
    numbers = iter(range(len(names)))
    content["optimizer"] = {
        "optimizer": {
            "state": state,
            "param_groups": [
                {"wd_mult": wd, "step": 100, "params": [next(numbers) for _ in group]}
                for wd, group in zip((1.0, 0.0), groups, strict=True)
            ],
        },
        "fp32_from_fp16_params": [[originals[name] for name in group] for group in groups],
    }
    content["opt_param_scheduler"] = {"num_steps": 800}
    torch.save(content, path)
    convert.convert(source, tmp_path / "out", "megatron", tensor=2, pipeline=2, optimizer=True)
    opened = convert.open_checkpoint(tmp_path / "out")
    assert opened.optimizer is not None
    found = opened.optimizer()
    assert found.scheduler == {"num_steps": 800} and found.groups[0]["step"] == 100
    with Reader() as reader:
        for number, name in enumerate(names):
            assert torch.equal(reader.tensor(found.slots["exp_avg_sq"][name]), state[number]["exp_avg_sq"]), name
            assert torch.equal(reader.tensor(found.slots["fp32_param"][name]), originals[name]), name
