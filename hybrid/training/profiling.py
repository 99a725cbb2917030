"""torch's profiler over some steps, and a snapshot of the GPU's memory, where a recipe asks for them."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from hybrid.config import TrainerConfig
from hybrid.training.distributed import World

# Allocations and releases that a snapshot remembers.
_EVENTS = 200_000


class Profiling:
    """Called after each step. Files are `RUN/profile/rankN.json` (chrome://tracing, Perfetto) and `memory_rankN.pickle`
    (pytorch.org/memory_viz).
    """

    def __init__(self, trainer: TrainerConfig, run: Path, world: World, step: int):
        self._trainer, self._folder, self._world = trainer, run / "profile", world
        self._profiler: Any = None
        self._over = contextlib.ExitStack()
        self._prepare(step)

    def __enter__(self) -> "Profiling":
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.close()

    def after(self, step: int) -> list[str]:
        """A step has ended; returns what there is to say about it."""
        said = []
        if self._profiler is not None and step == self._trainer.profile[1]:
            said.append(self._write_profile())
        if step == self._trainer.memory_snapshot and not torch.cuda.is_available():
            said.append("trainer.memory_snapshot is passed over: there is no GPU here whose memory it could show")
        elif step == self._trainer.memory_snapshot:
            path = self._file(f"memory_rank{self._world.rank}.pickle")
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
            said.append(f"the GPU's memory after step {step} is in {path}")
        self._prepare(step)
        return said

    def _prepare(self, step: int) -> None:
        """Start what is to record the next step."""
        if self._trainer.profile and step + 1 == self._trainer.profile[0]:
            self._profiler = torch.profiler.profile(profile_memory=True, acc_events=True)
            self._over.enter_context(self._profiler)
        snapshot = self._trainer.memory_snapshot if torch.cuda.is_available() else None
        if snapshot and step + 2 == max(2, snapshot):
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)

    def _write_profile(self) -> str:
        self._over.close()
        path = self._file(f"rank{self._world.rank}.json")
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None
        first, last = self._trainer.profile
        return f"the profile of steps {first} to {last} is in {path}"

    def _file(self, name: str) -> Path:
        self._folder.mkdir(exist_ok=True)
        return self._folder / name
