"""Training on the GPU beside training on the CPU: 50 steps of a small hybrid from one checkpoint.

How far apart? float32 on the GPU computes the same sums in another order, and training carries the differences on. bf16
rounds every intermediate result to 8 bits, FP8 the factors of products to 4. What is asked of each precision is a band
around the CPU's losses, which fall by several tenths in these steps.
"""

from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid.config import Settings
from tests import toy
from tests.gpu import runs

pytestmark = pytest.mark.gpu
TYPES = (torch.bfloat16, torch.float32)

RUNS: dict[str, tuple[float, dict[str, dict[str, Any]]]] = {
    "torch modules, float32": (1e-3, {"model": {"kernels": "reference"}}),
    "fused, float32": (1e-3, {}),
    "fused, bf16": (0.03, {"trainer": {"precision": "bf16"}}),
    "torch modules, bf16": (0.03, {"trainer": {"precision": "bf16"}, "model": {"kernels": "reference"}}),
    "fused, bf16, full recomputation": (0.03, {"trainer": {"precision": "bf16", "recompute": "full"}}),
    "fused, FP8, current scaling": (0.1, {"trainer": {"precision": "fp8_current"}}),
    "fused, FP8, delayed scaling": (0.1, {"trainer": {"precision": "fp8_delayed"}}),
}
# Which expert a token goes to is a matter of the last bits where two are nearly alike; a few tokens go another way.
WITH_EXPERTS = {"torch modules, float32": 5e-3, "fused, float32": 5e-3, "fused, bf16": 0.05}
CASES = [(model, name) for model in runs.MODELS for name in RUNS if "experts" not in model or name in WITH_EXPERTS]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_losses_stay_in_a_band_around_those_of_the_cpu(
    on_cpu: dict[str, "Future[Settings]"], model: str, name: str
) -> None:
    from hybrid.training.loop import train

    band, changes = RUNS[name]
    band = WITH_EXPERTS[name] if "experts" in model else band
    cpu = on_cpu[model].result()
    run = replace(
        cpu,
        name=name,
        **{section: replace(getattr(cpu, section), **values) for section, values in changes.items()},
    )
    runs.take_up(cpu, run)
    train(run)
    expected, losses = toy.metrics(cpu), toy.metrics(run)
    apart = {step: abs(losses[step] - expected[step]) for step in losses}
    assert list(apart) == list(range(runs.START + 1, runs.START + runs.STEPS + 1))
    first, last = expected[runs.START], expected[runs.START + runs.STEPS]
    print(f"{model}, {name}: {max(apart.values()):.1e} of {first:.2f} to {last:.2f}")
    assert max(apart.values()) <= band, apart


def test_gradients_and_moments_in_bf16_train_the_same(on_cpu: dict[str, "Future[Settings]"]) -> None:
    """Both from the CPU's weights, without its moments: those of one kind of optimizer do not fit the other."""
    from hybrid.training.loop import train

    cpu = on_cpu["Mamba-2"].result()
    losses = []
    for name, aware in (("float32 moments", False), ("bf16 moments", True)):
        run = replace(
            cpu,
            name=name,
            trainer=replace(cpu.trainer, precision="bf16", max_steps=runs.STEPS),
            optimizer=replace(cpu.optimizer, precision_aware=aware),
            checkpoint=replace(cpu.checkpoint, load=str(runs.checkpoint(cpu))),
        )
        train(run)
        losses.append(toy.metrics(run))
    apart = {step: abs(losses[0][step] - losses[1][step]) for step in losses[0]}
    print(f"moments in bf16: {max(apart.values()):.1e}")
    assert len(apart) == runs.STEPS and max(apart.values()) <= 0.05, apart


def test_gradients_are_scaled_by_a_factor_that_is_not_rounded() -> None:
    from hybrid.training.setup import _scale_gradients

    gradients = [torch.randn(size, device="cuda").to(dtype) for size in (70_000, 1) for dtype in TYPES]
    buffers = [
        SimpleNamespace(grad_data=gradient.clone(), extra_main_grads=[gradient.clone()]) for gradient in gradients
    ]
    chunk: Any = SimpleNamespace(buffers=buffers[:2], expert_parallel_buffers=buffers[2:])
    factor = torch.tensor(1 / 30_011, device="cuda")
    _scale_gradients(chunk, factor)
    for gradient, buffer in zip(gradients, buffers, strict=True):
        expected = (gradient.float() * factor).to(gradient.dtype)
        assert torch.equal(buffer.grad_data, expected) and torch.equal(buffer.extra_main_grads[0], expected)
