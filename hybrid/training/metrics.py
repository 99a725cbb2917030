"""What a step is measured by: seconds by phase, the slowest rank, memory, and the share of the hardware's rate."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hybrid.config import Settings
from hybrid.costs import flops
from hybrid.costs.hardware import GIB, GPUS
from hybrid.training.distributed import World

# Phases of a step; what is left of its time is "other". Validation and saving are not part of a step.
STEP_PHASES = ("data", "forward_backward", "optimizer")


class Clock:
    """Seconds of this process by phase. A phase within a phase counts for itself alone."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._phases: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure a phase."""
        self._switch()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._switch()
            self._phases.pop()

    def take(self) -> dict[str, float]:
        """The seconds since the last call; "other" is what belongs to no phase."""
        self._switch()
        taken, self._seconds = self._seconds, {}
        return {**dict.fromkeys((*STEP_PHASES, "other"), 0.0), **taken}

    def _switch(self) -> None:
        now = time.perf_counter()
        phase = self._phases[-1] if self._phases else "other"
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now


class OwnTime:
    """Seconds of a step until this rank has nothing more to do on its own: until the gradients are reduced.

    After that all ranks wait for the slowest, so this is what tells it from the others. On CUDA it is the GPU's time.
    With pipeline stages, waiting for the stage before is part of it.
    """

    def __init__(self, device: torch.device):
        self._events = None
        if device.type == "cuda":
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        self._times = [0.0, 0.0]

    def mark(self, end: bool) -> None:
        """The step begins, or the rank's own work in it ends."""
        if self._events:
            self._events[end].record()
        self._times[end] = time.perf_counter()

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, which reduces the gradients, with the mark before it."""

        def marked(*arguments: Any, **keywords: Any) -> Any:
            self.mark(end=True)
            return function(*arguments, **keywords)

        return marked

    def seconds(self) -> float:
        """Of the step that has just ended, when the GPU has come past the second mark."""
        if self._events:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._times[1] - self._times[0]


class Rates:
    """Tokens and operations per second, from a step's seconds."""

    def __init__(self, settings: Settings, world: World):
        self._processes = world.size
        self._flops_per_token = flops.per_token(settings).total
        self._peak = peak_flops(world.device)

    def of(self, tokens: float, seconds: float) -> dict[str, float]:
        """Rates of a step; "mfu" only where the GPU is one whose peak is known."""
        reached = tokens * self._flops_per_token / seconds / self._processes
        values = {"tokens_per_second": tokens / seconds, "tflops_per_second_per_process": reached / 1e12}
        return {**values, "mfu": reached / self._peak} if self._peak else values


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations per second of a GPU, as the plan counts them; None if it is not a known one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu.bf16 for gpu in GPUS.values() if gpu.name in name), None)


def memory_gib(device: torch.device) -> float:
    """The most GPU memory that tensors have taken since the last call; of the CPU, what the process holds now."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / GIB
    import psutil

    return psutil.Process().memory_info().rss / GIB


def over_ranks(own: list[float], data: list[float], memory: list[float]) -> dict[str, float]:
    """From each rank's own seconds, seconds of waiting for data and GiB: the slowest rank, and the most of each."""
    values = {"data_seconds": max(data), "memory_gib": max(memory)}
    if len(own) > 1:
        slowest = max(range(len(own)), key=own.__getitem__)
        values |= {
            "slowest_rank": slowest,
            "slowest_seconds": own[slowest],
            "median_rank_seconds": statistics.median(own),
        }
    return values
