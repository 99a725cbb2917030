"""Training over two GPUs, with NCCL between them, beside training in one process on the CPU: see test_training."""

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch

from hybrid.config import Settings
from tests import toy
from tests.gpu import runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most"),
]

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "DP2, overlapped": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "TP2 + SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    "CP2, bf16": {"context": 2},  # with transformer-engine's attention, which shares no sequence in float32
    "EP2": {"expert": 2},
}
# The bands of test_training.
CASES = {
    "Mamba-2": (1e-3, ["DP2", "DP2, overlapped", "TP2 + SP", "PP2", "CP2", "CP2, bf16"]),
    "Mamba-2, experts, MTP": (5e-3, ["TP2 + SP", "PP2", "EP2"]),
    "Mamba-1": (1e-3, ["DP2", "TP2 + SP", "PP2", "CP2"]),
}
BF16_BAND = 0.03


@pytest.mark.parametrize("model", CASES)
def test_losses_stay_in_a_band_around_those_of_one_process(on_cpu: dict[str, "Future[Settings]"], model: str) -> None:
    cpu, (band, layouts) = on_cpu[model].result(), CASES[model]
    some = [
        replace(
            cpu,
            name=name,
            parallel=replace(cpu.parallel, **LAYOUTS[name]),
            trainer=replace(cpu.trainer, precision="bf16" if "bf16" in name else "fp32"),
        )
        for name in layouts
    ]
    for run in some:
        runs.take_up(cpu, run)
    toy.start(some, processes=2)
    expected = toy.metrics(cpu)
    for run in some:
        losses = toy.metrics(run)
        apart = {step: abs(losses[step] - expected[step]) for step in losses}
        print(f"{model}, {run.name}: {max(apart.values()):.1e}")
        assert list(apart) == list(range(runs.START + 1, runs.START + runs.STEPS + 1))
        assert max(apart.values()) <= (BF16_BAND if "bf16" in run.name else band), (run.name, apart)
