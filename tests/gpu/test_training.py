"""Training on the GPU beside training on the CPU: 50 steps of a small hybrid from one checkpoint.

How far apart? float32 on the GPU computes the same sums in another order, and transformer-engine's matrix products
round their inputs to TF32 (10 bits); training carries the differences on. What is asked of each precision is a band
around the CPU's losses, which fall by several tenths in these steps.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid.config import Settings
from tests import toy

pytestmark = pytest.mark.gpu

START, STEPS = 2, 50
MODEL: dict[str, Any] = {
    "layer_pattern": "M-M*",
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "mamba_state_dim": 32,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "vocab_size_multiple": 16,
    "init_std": 0.05,
}
RUNS: dict[str, tuple[float, dict[str, dict[str, Any]]]] = {
    "torch modules, float32": (1e-3, {"model": {"kernels": "reference"}}),
    "fused, float32": (5e-3, {}),
    "fused, bf16": (0.03, {"trainer": {"precision": "bf16"}}),
    "torch modules, bf16": (0.03, {"trainer": {"precision": "bf16"}, "model": {"kernels": "reference"}}),
    "fused, bf16, full recomputation": (0.03, {"trainer": {"precision": "bf16", "recompute": "full"}}),
    "fused, FP8, current scaling": (0.1, {"trainer": {"precision": "fp8_current"}}),
    "fused, FP8, delayed scaling": (0.1, {"trainer": {"precision": "fp8_delayed"}}),
    "fused, bf16 gradients and moments": (
        0.05,
        {"trainer": {"precision": "bf16"}, "optimizer": {"precision_aware": True}},
    ),
}


@pytest.fixture(scope="module", params=[1, 2], ids=["Mamba-1", "Mamba-2"])
def on_cpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A run on the CPU with a checkpoint after two steps; its fifty more are the measure."""
    folder = tmp_path_factory.mktemp(f"cpu{request.param}")
    first = toy.settings(
        folder,
        "cpu",
        steps=START,
        model={**MODEL, "mamba_version": request.param},
        data={"sequence_length": 128},
        trainer={"micro_batch_size": 4, "global_batch_size": 8},
        checkpoint={"save_interval": START, "keep_last": 1},
    )
    without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "8"}
    toy.start([first], environment=without_gpu)
    shutil.copytree(_checkpoint(first), Path(first.folder) / "start")
    run = replace(first, trainer=replace(first.trainer, max_steps=START + STEPS))
    toy.start([run], environment=without_gpu)
    return run


@pytest.mark.parametrize("name", RUNS)
def test_losses_stay_in_a_band_around_those_of_the_cpu(on_cpu: Settings, name: str) -> None:
    from hybrid.training.loop import train

    band, changes = RUNS[name]
    run = replace(
        on_cpu,
        name=name,
        **{section: replace(getattr(on_cpu, section), **values) for section, values in changes.items()},
    )
    shutil.copytree(Path(on_cpu.folder) / "start", _checkpoint(run))
    train(run)
    expected, losses = toy.metrics(on_cpu), toy.metrics(run)
    apart = {step: abs(losses[step] - expected[step]) for step in losses}
    assert len(apart) == STEPS
    print(f"{name}: {max(apart.values()):.1e} of {expected[START]:.2f} to {expected[START + STEPS]:.2f}")
    assert max(apart.values()) <= band, apart


def _checkpoint(run: Settings) -> Path:
    return Path(run.folder) / run.name / f"checkpoints/iter_{START:07}"
