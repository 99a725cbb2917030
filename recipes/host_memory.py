"""Whether a run without GPUs fits into this machine's memory: too large a one is killed without a word, or swaps."""

from pathlib import Path

from hybrid.config import Settings
from hybrid.costs import memory, pipeline
from hybrid.errors import Problem
from recipes.executors import visible_gpus

_CGROUPS = Path("/sys/fs/cgroup")


def too_large(built: Settings, count: int) -> list[Problem]:
    """The problem that `count` processes on the CPUs of this machine take more memory than is free; [] if they may fit.

    What they take is a lower bound: the tensors that are counted for a GPU's fused kernels. PyTorch's own keep more.
    """
    if visible_gpus() or Path("/dev/dxg").exists():  # the latter: GPUs under WSL
        return []
    pattern = pipeline.stage_pattern(built)
    of_stages = [memory.training(built, pattern, stage, count) for stage in range(built.parallel.pipeline)]
    ranks = count / built.parallel.pipeline
    states = ranks * sum(it.weights + it.gradients + it.optimizer for it in of_stages)
    wanted, there = ranks * sum(it.total for it in of_stages), available()
    if wanted <= there:
        return []
    batch = "a smaller trainer.micro_batch_size or data.sequence_length, " if states < there else ""
    what = f"takes at least {_gib(wanted)} of memory to train in {count} process{'es' if count > 1 else ''} on CPUs"
    message = (
        f"{what} ({_gib(states)} of weights, gradients and optimizer), and this machine has no GPU and {_gib(there)} "
        f"free; take {batch}a smaller model (shrink(RECIPE) is one of the same shape) or a machine with GPUs"
    )
    return [Problem("model", message)]


def available(groups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes of memory that this process can still have: what is free here, at most what its control groups allow."""
    import psutil

    return float(min([psutil.virtual_memory().available, *_limits(groups, own)]))


def _limits(groups: Path, own: Path) -> list[int]:
    """Limits of the control groups that a process is in (cgroups(7), both versions), in bytes."""
    lines = own.read_text().splitlines() if own.is_file() else []
    found: list[int] = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        # A container sees its own group as the root, also where the path names it from outside.
        inner = base / path.strip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(base) and (file := folder / name).is_file():
                text = file.read_text().strip()
                found += [int(text)] if text.isdigit() else []
    return found


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
