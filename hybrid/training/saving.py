"""Saving: written beside, completed, renamed, so that a reader never sees half of a checkpoint.

An asynchronous save is planned and copied by `Saver.save`, written by a forked process, and completed by the first
`Saver.poll` that finds every rank's part written. Whatever goes wrong is raised there, on all ranks.
"""

import json
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from hybrid import atomic, settings_file
from hybrid.config import Settings
from hybrid.data.tokenizer import Tokenizer
from hybrid.errors import UserError
from hybrid.training import checkpoint, checksums, folder, optimizer_state, provenance, writer
from hybrid.training.checkpoint import Position
from hybrid.training.distributed import World
from hybrid.training.setup import Training


@dataclass(frozen=True)
class Saved:
    """A finished checkpoint: seconds from its beginning to its end, those the training waited, and its bytes."""

    path: Path
    step: int
    seconds: float
    stall_seconds: float
    size: int


@dataclass
class _Pending:
    unfinished: Path
    step: int
    began: float
    stalled: float


class Saver:
    """Saves the checkpoints of a run, one at a time. All ranks call its methods together."""

    def __init__(self, checkpoints: Path, settings: Settings, tokenizer: Tokenizer | None, world: World):
        self._checkpoints, self._settings, self._tokenizer, self._world = checkpoints, settings, tokenizer, world
        self._calls = AsyncCallsQueue(persistent=False)
        self._buffer = writer.HostBuffer()
        self._pending: _Pending | None = None
        self._validated = False
        self._removal: threading.Thread | None = None

    def save(self, training: Training, position: Position, *, wait: bool) -> list[Saved]:
        """Save everything as `iter_NNNNNNN`; returns what is finished, an earlier save included.

        With `wait`, this one is among them. Raises UserError on every rank when the disk is full or not writable;
        checkpoints saved before stay as they are.
        """
        finished = self.poll(wait=True)
        self._finish_removal()
        began = time.monotonic()
        unfinished = self._begin(position.step)
        self._pending = _Pending(unfinished, position.step, began, 0.0)
        own_process = not wait and self._settings.checkpoint.asynchronous
        try:
            with (
                optimizer_state.kept_on_device(training.optimizer),
                writer.results_in(unfinished, self._world.rank),
            ):
                metadata = checkpoint.content_metadata(self._settings)
                format_of_it = checkpoint.serialisable(metadata)
                if torch.cuda.is_available():
                    # Ask for the state on the first data parallel rank alone, as it is made there.
                    metadata["distrib_optim_fully_reshardable_mem_efficient"] = True
                planned = dist_checkpointing.save(
                    checkpoint.state(training, metadata, position),
                    str(unfinished),
                    content_metadata=format_of_it,
                    async_sharded_save=True,
                    async_strategy="mcore",
                    # What is saved does not change its shape in the course of a run.
                    validate_access_integrity=not self._validated,
                )
                self._validated = True
            assert planned
            request = writer.request(planned, unfinished, self._world.rank, self._buffer, own_process=own_process)
            del planned
            if own_process:
                self._calls.schedule_async_request(request)
            else:
                request.execute_sync()
            problem = ""
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = _why_not_writable(unfinished) or say(error)
        self._raise_if_any(problem)
        self._pending.stalled = time.monotonic() - began
        if own_process:
            return finished
        finished.append(self._publish())
        if wait:
            self._finish_removal()
        return finished

    def poll(self, *, wait: bool = False) -> list[Saved]:
        """Complete the save under way if its parts are written, or `wait` for them. Raises UserError if it failed."""
        if self._pending is None:
            return []
        waits = time.monotonic()
        try:
            if not self._calls.maybe_finalize_async_calls(blocking=wait):
                return []
            problem = ""
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = _why_not_writable(self._pending.unfinished) or say(error)
        self._raise_if_any(problem)
        self._pending.stalled += time.monotonic() - waits
        return [self._publish()]

    def _finish_removal(self) -> None:
        if self._removal:
            self._removal.join()
            self._removal = None

    def _begin(self, step: int) -> Path:
        """Make the folder that is written into, with the small files. A name of its own, whoever else still writes."""
        number = self._world.total(float(int.from_bytes(os.urandom(5))) if self._world.is_main else 0.0)[0]
        unfinished = self._checkpoints / f"{folder.UNFINISHED}{step}-{int(number):x}"
        problem = ""
        if self._world.is_main:
            try:
                folder.remove_unfinished(self._checkpoints)
                unfinished.mkdir(parents=True)
                settings_file.write(self._settings, unfinished)
                (unfinished / provenance.VERSIONS_FILE).write_text(json.dumps(provenance.versions(), indent=1) + "\n")
                if self._tokenizer is not None:
                    (unfinished / folder.TOKENIZER).mkdir()
                    self._tokenizer.save(unfinished / folder.TOKENIZER)
            except OSError as error:
                problem = say(error)
        self._pending = _Pending(unfinished, step, 0.0, 0.0)
        self._raise_if_any(problem)
        return unfinished

    def _publish(self) -> Saved:
        """Write the checksums and give the folder its name."""
        pending, size, problem, began = self._pending, 0, "", time.monotonic()
        assert pending is not None
        final = folder.checkpoint_folder(self._checkpoints, pending.step)
        if self._world.is_main:
            try:
                size = checksums.write(pending.unfinished, writer.collect_sums(pending.unfinished))
                self._rename(pending.unfinished, final)
            except (OSError, ValueError) as error:
                problem = say(error)
        self._raise_if_any(problem)
        self._pending = None
        now = time.monotonic()
        return Saved(final, pending.step, now - pending.began, pending.stalled + now - began, size)

    def _rename(self, unfinished: Path, final: Path) -> None:
        unfinished.rename(final)
        _sync(self._checkpoints)
        atomic.write_text(self._checkpoints / folder.TRACKER_FILE, str(folder.latest_step(self._checkpoints)))
        old = folder.set_aside_old(self._checkpoints, self._settings.checkpoint)
        self._removal = threading.Thread(target=_remove, args=(old,))
        self._removal.start()

    def _raise_if_any(self, problem: str) -> None:
        """Raise UserError on every rank if one has a problem, without leaving anything behind."""
        if not self._world.any(bool(problem)):
            return
        assert self._pending is not None
        if self._world.is_main:
            shutil.rmtree(self._pending.unfinished, ignore_errors=True)
        step, self._pending = self._pending.step, None
        final = folder.checkpoint_folder(self._checkpoints, step)
        reason = problem or "another process could not write"
        raise UserError(f"{final}: this checkpoint was not saved ({reason}); earlier ones are intact")


def say(problem: BaseException) -> str:
    """One line of an exception; torch's CheckpointException ends with the one that caused it."""
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    line = lines[-1] if isinstance(problem, CheckpointException) else lines[0]
    if "results_queue should not be empty" in line:
        return "the process that wrote it was killed"
    return line


def _remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the names in a folder survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_not_writable(path: Path) -> str:
    """What the system says to a small write; megatron-core's writer keeps it to itself. Empty if it says nothing."""
    try:
        with (path / "probe").open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        (path / "probe").unlink()
    except OSError as problem:
        return say(problem)
    return ""
