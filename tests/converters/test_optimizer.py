"""Optimizer state, carried between layouts and formats, against megatron-core's own optimizers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from converters import convert, legacy_optimizer, summary
from converters.checkpoint import SLOTS, Checkpoint
from converters.legacy_optimizer import Parameter, place
from converters.tensors import zeros
from hybrid.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Settings,
    TrainerConfig,
)
from hybrid.errors import ConfigError, UserError

KINDS = ["hybrid", "tied", "moe"]


def run_settings(model: ModelConfig, distributed: bool, precision: Any = "bf16") -> Settings:
    return Settings(
        name="test",
        model=model,
        parallel=ParallelConfig(distributed_optimizer=distributed),
        data=DataConfig(sequence_length=16),
        optimizer=OptimizerConfig(warmup_samples=1, decay_samples=100),
        trainer=TrainerConfig(precision=precision, max_steps=4),
        checkpoint=CheckpointConfig(),
    )


@pytest.fixture
def trained() -> Iterator[Callable[..., Any]]:
    """Give a model and optimizer of Megatron, alone in this process, after a step with random gradients."""
    from hybrid.training import distributed, setup

    def start(settings: Settings, step: bool = True) -> Any:
        distributed.stop()
        world = distributed.start(settings.parallel, None, 1)
        training = setup.set_up(settings, settings.model.pattern, world.device)
        if step:
            generator = torch.Generator().manual_seed(0)
            for chunk in training.chunks:
                for parameter in chunk.parameters():
                    gradient: Any = parameter.main_grad
                    gradient.copy_(torch.randn(gradient.shape, generator=generator))
            training.optimizer.step()
            training.scheduler.step(increment=8)
        return training

    yield start
    distributed.stop()


def main_state(training: Any) -> dict[str, dict[str, torch.Tensor]]:
    """What the optimizer holds for every parameter, by the parameter's live name: the independent reading."""
    optimizer = training.optimizer
    inner = optimizer.chained_optimizers[0] if hasattr(optimizer, "chained_optimizers") else optimizer
    result: dict[str, dict[str, torch.Tensor]] = {}
    if hasattr(inner, "get_parameter_state_dp_zero"):
        state = inner.get_parameter_state_dp_zero(use_gloo_comm=False)
        for index, buffer in enumerate(inner.buffers):
            (flat,) = state[index].values()
            for parameter, (start, end, _) in buffer.param_index_map.items():
                keys = {"param": "fp32_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
                found = {new: flat[old][start:end].view(parameter.shape) for old, new in keys.items()}
                result[name_of(training, parameter)] = found
        return result
    for half, full in zip(inner.float16_groups, inner.fp32_from_float16_groups, strict=True):
        for parameter, original in zip(half, full, strict=True):
            moments = inner.optimizer.state[original]
            result[name_of(training, parameter)] = {"fp32_param": original.detach(), **moments}
    return result


def name_of(training: Any, parameter: torch.Tensor) -> str:
    (name,) = (name for name, other in training.chunks[0].named_parameters() if other is parameter)
    return name.removeprefix("module.").removeprefix("module.")


def save_legacy(folder: Path, training: Any, settings: Settings) -> Path:
    """As megatron/training/checkpointing.py saves one rank."""
    from converters import arguments, layout
    from hybrid.training.checkpoint import unwrap

    rank = folder / "iter_0000004/mp_rank_00"
    rank.mkdir(parents=True)
    source = Checkpoint(path=folder, format="megatron", model=settings.model, tensors={}, samples=8)
    args = arguments.from_model(source, layout.target(settings.model), settings.model.vocab_size_multiple)
    args.overlap_grad_reduce = False
    torch.save(
        {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 4,
            "model": unwrap(training.chunks[0]).state_dict_for_save_checkpoint(),
            "optimizer": training.optimizer.state_dict(),
            "opt_param_scheduler": training.scheduler.state_dict(),
        },
        rank / "model_optim_rng.pt",
    )
    if settings.parallel.distributed_optimizer:
        optimizer = training.optimizer
        inner = optimizer.chained_optimizers[0] if hasattr(optimizer, "chained_optimizers") else optimizer
        torch.save(inner.get_parameter_state_dp_zero(use_gloo_comm=False), rank / "distrib_optim.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("4")
    return folder


def slots_of(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What is read from a checkpoint: slot -> canonical name -> tensor."""
    from converters.streams import Reader

    opened = convert.open_checkpoint(path)
    assert opened.optimizer is not None
    state = opened.optimizer()
    with Reader() as reader:
        return {slot: {name: reader.tensor(t) for name, t in of.items()} for slot, of in state.slots.items()}


def compare(
    found: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]], model: Any
) -> None:
    """Canonical names against the live ones of a model without transformer-engine."""
    from converters.megatron import live_name

    for slot in SLOTS:
        named = {live_name(name, model, fused_norms=False): tensor for name, tensor in found[slot].items()}
        assert named.keys() == expected.keys()
        for name, state in expected.items():
            rows = state[slot].shape[0]
            assert torch.equal(named[name][:rows], state[slot]), (slot, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
def test_state_follows_its_parameter_through_layouts(
    tmp_path: Path, trained: Callable[..., Any], make_model: Any, kind: str, distributed: bool
) -> None:
    """Megatron's file of one rank -> several ranks -> torch_dist -> one rank; Megatron loads what comes out."""
    model = make_model(kind)
    settings = run_settings(model, distributed)
    training = trained(settings)
    expected = main_state(training)
    source = save_legacy(tmp_path / "source", training, settings)
    said = {"vocab_size_multiple": model.vocab_size_multiple}
    compare(slots_of(source), expected, model)
    sizes = {"tensor": 2, "pipeline": 2, "expert": 2 if kind == "moe" else 1}
    convert.convert(source, tmp_path / "a", "megatron", optimizer=True, fused_norms=False, overrides=said, **sizes)
    compare(slots_of(tmp_path / "a"), expected, model)
    convert.convert(tmp_path / "a", tmp_path / "b", "torch_dist", optimizer=True, verify=True)
    compare(slots_of(tmp_path / "b"), expected, model)
    convert.convert(tmp_path / "b", tmp_path / "c", "megatron", optimizer=True, fused_norms=False)
    compare(slots_of(tmp_path / "c"), expected, model)

    from hybrid.training import torch_adam

    again = trained(settings, step=False)
    torch_adam.prepare_to_load(again)  # Megatron's distributed optimizer stumbles over torch's AdamW otherwise
    content = torch.load(tmp_path / "c/iter_0000004/mp_rank_00/model_optim_rng.pt", weights_only=False)
    assert content["opt_param_scheduler"] == training.scheduler.state_dict()
    again.optimizer.load_state_dict(content["optimizer"])
    if distributed:
        inner = (
            again.optimizer.chained_optimizers[0] if hasattr(again.optimizer, "chained_optimizers") else again.optimizer
        )
        state = torch.load(tmp_path / "c/iter_0000004/mp_rank_00/distrib_optim.pt", weights_only=False)
        inner.data_parallel_group_gloo = inner.data_parallel_group
        inner.load_parameter_state_from_dp_zero(state)
    for name, state in main_state(again).items():
        for slot in SLOTS:
            assert torch.equal(state[slot], expected[name][slot]), (name, slot)


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("to", ["megatron", "torch_dist"])
def test_weights_in_float32_are_the_originals_that_the_optimizer_has(
    tmp_path: Path, trained: Callable[..., Any], make_model: Any, distributed: bool, to: str
) -> None:
    """What the 16 bits of the model have lost is not lost: a model in float32 has no other copy of its weights."""
    from converters.megatron import live_name

    settings = run_settings(make_model("hybrid"), distributed)
    training = trained(settings)
    training.optimizer.step()  # the first one had a learning rate of zero
    expected = main_state(training)
    assert any(not torch.equal(state["fp32_param"], state["fp32_param"].bfloat16()) for state in expected.values())
    source = save_legacy(tmp_path / "source", training, settings)
    convert.convert(source, tmp_path / "a", to, optimizer=True, dtype="float32", verify=True)
    compare(slots_of(tmp_path / "a"), expected, settings.model)
    for name, tensor in convert.stream(tmp_path / "a"):
        original = expected[live_name(name, settings.model, fused_norms=False)]["fp32_param"]
        assert torch.equal(tensor[: len(original)], original), name


def test_a_checkpoint_of_ours_keeps_its_optimizer(tmp_path: Path, trained: Callable[..., Any], make_model: Any) -> None:
    """What training saves (torch_dist) -> legacy over 2 ranks -> torch_dist, which training can take up."""
    from hybrid.training import checkpoint
    from hybrid.training.distributed import World
    from hybrid.training.saving import Saver

    settings = run_settings(make_model("hybrid"), distributed=True)
    training = trained(settings)
    expected = main_state(training)
    world = World(0, 1, torch.device("cpu"))
    Saver(tmp_path / "run", settings, None, world).save(training, checkpoint.Position(4, 32), wait=True)
    convert.convert(tmp_path / "run", tmp_path / "a", "megatron", tensor=2, optimizer=True)
    convert.convert(tmp_path / "a", tmp_path / "b", "torch_dist", tensor=2, optimizer=True)
    opened = [convert.open_checkpoint(tmp_path / name) for name in ("run", "b")]
    assert not list(summary.diff(*opened))
    again = trained(settings, step=False)
    # Written for two ranks, so that the random state of one, which is not carried over, is not asked for.
    position = checkpoint.load(tmp_path / "b/iter_0000004", settings, again)
    assert position == checkpoint.Position(4, 32)
    for name, state in main_state(again).items():
        for slot in SLOTS:
            assert torch.equal(state[slot], expected[name][slot]), (name, slot)


@pytest.mark.parametrize("bucket", [None, 100, 1000])
@pytest.mark.parametrize("shared", [frozenset(), frozenset({"b"})])
def test_buffers_are_laid_out_as_megatron_does(bucket: int | None, shared: frozenset[str]) -> None:
    """Against `_compute_per_buffer_param_layout`, whose places have the padding between buckets in them."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    sizes = {"a": 130, "b": 64, "c": 7, "d": 500, "e": 3, "f": 128}
    tensors = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    for name in shared:
        tensors[name].shared_embedding = True  # type: ignore[attr-defined]
    theirs = DistributedOptimizer._compute_per_buffer_param_layout(
        list(tensors.values()), bucket, 4, DistributedDataParallelConfig()
    )
    members = [Parameter(name, zeros((size,), "bfloat16"), 0) for name, size in sizes.items()]
    places, total = place(members, bucket, shared)
    assert total == sum(theirs.per_bucket_numel_unpadded)
    for name, tensor in tensors.items():
        start, _, number = theirs.param_index_map[tensor]
        before = sum(theirs.per_bucket_numel_unpadded[:number])
        assert places[0, name] == before + start - theirs.bucket_indices[number][0]


def test_what_cannot_be_carried_is_said(tmp_path: Path, saved: Any) -> None:
    source, _ = saved("hybrid")
    with pytest.raises(ConfigError, match="has no optimizer state"):
        convert.convert(source, tmp_path / "a", "megatron", optimizer=True)
    with pytest.raises(ConfigError, match="hf has no place for the optimizer's state"):
        convert.convert(source, tmp_path / "a", "hf", optimizer=True)


def test_state_that_does_not_fit_is_refused() -> None:
    chunks = [{"x.weight": zeros((4, 4), "bfloat16"), "x.bias": zeros((4,), "bfloat16")}]
    state = {"exp_avg": zeros((3, 3), "float32"), "exp_avg_sq": zeros((3, 3), "float32")}
    content = {"optimizer": {"state": {0: state}, "param_groups": [{"wd_mult": 1.0, "params": [0]}]}}
    with pytest.raises(UserError, match="cannot be assigned"):
        legacy_optimizer.read_rank(chunks, content, None, {}, (0, 0, 0))
