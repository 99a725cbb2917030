"""What a step optimises: losses and their weights, decay, schedule."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import hybrid.quiet  # noqa: F401
from hybrid.config import Settings
from hybrid.costs.pipeline import stage_pattern
from hybrid.training import z_loss
from hybrid.training.distributed import start, stop
from hybrid.training.setup import Training, set_up
from tests import toy


@contextmanager
def training(settings: Settings) -> Iterator[Training]:
    world = start(settings.parallel, None, settings.trainer.seed)
    try:
        yield set_up(settings, stage_pattern(settings), world.device)
    finally:
        stop()


@pytest.mark.parametrize("version", [1, 2])
def test_weights_alone_decay(version: int, tmp_path: Path) -> None:
    model = {
        "layer_pattern": "M-M*E",
        "mamba_version": version,
        "num_experts": 2,
        "moe_ffn_hidden_size": 32,
        "add_linear_bias": True,
        "normalization": "LayerNorm",
    }
    with training(toy.settings(tmp_path, model=model)) as made:
        optimizer: Any = made.optimizer
        decays = {}
        for part in optimizer.chained_optimizers:
            for parameter, (group_index, _) in part.model_param_group_index_map.items():
                decays[parameter] = part.optimizer.param_groups[group_index]["weight_decay"]
        names = {name.removeprefix("module."): parameter for name, parameter in made.chunks[0].named_parameters()}
        assert len(decays) == len(names)
        for name, parameter in names.items():
            last = name.rpartition(".")[2]
            spared = "norm" in name or "bias" in last or last in ("A_log", "D", "dt_bias")
            assert decays[parameter] == (0.0 if spared else 0.1), name


def test_the_loss_of_a_bf16_model_is_computed_in_float32(tmp_path: Path) -> None:
    with training(toy.settings(tmp_path, model={"init_std": 0.2}, trainer={"precision": "bf16"})) as made:
        tokens = torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(0))
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(32).expand(2, -1)
        with torch.no_grad():
            losses = made.chunks[0](inputs, positions, None, labels=labels)
            logits = made.chunks[0](inputs, positions, None)
        assert losses.dtype == torch.float32
        expected = F.cross_entropy(logits.double().transpose(1, 2), labels, reduction="none")
        # Logits in bf16 are the same numbers in float64; the sum over 260 of them in float32 is what differs.
        torch.testing.assert_close(losses.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_z_loss_is_in_the_gradient_and_not_in_the_loss(precision: str, tmp_path: Path) -> None:
    settings = toy.settings(tmp_path, model={"init_std": 0.2}, trainer={"precision": precision})
    with training(settings) as made:
        model = made.chunks[0].module
        while hasattr(model, "module"):
            model = model.module
        labels = torch.randint(257, (2, 8))
        start_logits = torch.randn(8, 2, 260).to(torch.bfloat16 if precision == "bf16" else torch.float32) * 3
        plain = model.compute_language_model_loss(labels, start_logits.clone())
        z_loss.add(model, 0.01)
        logits = start_logits.clone().requires_grad_()
        losses = model.compute_language_model_loss(labels, logits * 1)
        assert torch.equal(losses, plain)
        weights = torch.rand(2, 8)
        (losses * weights).sum().backward()

        exact = start_logits.double().requires_grad_()
        entropy = F.cross_entropy(exact.permute(1, 2, 0), labels, reduction="none")
        ((entropy + 0.01 * exact.logsumexp(-1).t() ** 2) * weights).sum().backward()
        # A gradient of bf16 logits is a bf16 number (8 bits).
        near = 1e-2 if precision == "bf16" else 1e-5
        torch.testing.assert_close(logits.grad.double(), exact.grad, atol=near / 100, rtol=near)


@pytest.mark.parametrize("given", [{"warmup_samples": 40}, {"warmup_steps": 10}, {"warmup_tokens": 40 * 64}])
def test_a_warm_up_in_samples_steps_or_tokens_is_one_schedule(given: dict[str, int], tmp_path: Path) -> None:
    # Batches of 4: ten steps are 40 samples of 64 tokens.
    assert rates(toy.settings(tmp_path, steps=20, optimizer=given)) == pytest.approx(expected("cosine"))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_each_schedule_is_its_formula(schedule: str, tmp_path: Path) -> None:
    settings = toy.settings(tmp_path, steps=20, optimizer={"warmup_steps": 10, "schedule": schedule})
    settings.optimizer.wsd_decay_samples = 16 if schedule == "wsd" else None
    assert rates(settings) == pytest.approx(expected(schedule))


def test_a_growing_batch_moves_the_schedule_by_its_samples(tmp_path: Path) -> None:
    settings = toy.settings(
        tmp_path,
        steps=8,
        optimizer={"warmup_steps": 4},
        trainer={"global_batch_size": 8, "rampup_batch_size": [4, 4, 16]},
    )
    assert (settings.warmup_samples, settings.trainer.samples) == (16, 48)
    up, down = [4, 8, 12, 16], [24, 32, 40, 48]
    decay = [1e-4 + 0.9e-3 * 0.5 * (math.cos(math.pi * (samples - 16) / 32) + 1) for samples in down]
    assert rates(settings) == pytest.approx([samples / 16 * 1e-3 for samples in up] + decay)


def rates(settings: Settings) -> list[float]:
    """The learning rate after each step's samples."""
    found, consumed = [], 0
    with training(settings) as made:
        for _ in range(settings.trainer.steps):
            batch = settings.trainer.ramp.batch(consumed)
            consumed += batch
            made.scheduler.step(increment=batch)
            optimizer: Any = made.optimizer
            found.append(optimizer.param_groups[0]["lr"])
    return found


def expected(schedule: str) -> list[float]:
    """10 steps up to 1e-3, 10 steps down to 1e-4; WSD stays at the top until the last four."""
    up = [step / 10 * 1e-3 for step in range(1, 11)]
    shares = [step / 10 for step in range(1, 11)]
    shape = {
        "cosine": [0.5 * (math.cos(math.pi * share) + 1) for share in shares],
        "linear": [1 - share for share in shares],
        "constant": [1.0] * 10,
        "wsd": [1.0] * 6 + [0.5 * (math.cos(math.pi * share) + 1) for share in (0.25, 0.5, 0.75, 1.0)],
    }[schedule]
    return up + [1e-4 + 0.9e-3 * height for height in shape]
