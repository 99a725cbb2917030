"""Ends a process that makes no progress, after showing where each of its threads stands."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hybrid.training import folder

# As timeout(1) has it.
EXIT_CODE = 124
# Seconds that the thread of this module has, once the time is over, before the C code of faulthandler takes over: a
# call that hangs with Python's lock in its hand lets no thread run.
_GRACE = 15.0
# The process's own, whatever has been put in its place: it must have a file descriptor.
_STDERR: Any = sys.__stderr__


class Watchdog:
    """A context manager. While entered, `beat` must be called at least every `seconds`; 0 means that nobody watches.

    What the terminal gets is also left in the run's folder `run`: a line in its log, and the stacks in a file.
    """

    def __init__(self, seconds: float, rank: int, run: Path):
        self._seconds, self._rank, self._run = seconds, rank, run
        self._last, self._doing = time.monotonic(), ""
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if self._seconds:
            self._arm()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str) -> None:
        """Say that there is progress, and what comes next."""
        self._last, self._doing = time.monotonic(), doing

    def _arm(self) -> None:
        faulthandler.dump_traceback_later(self._seconds + _GRACE, exit=True, file=_STDERR)

    def _watch(self) -> None:
        armed = seen = self._last
        while not self._over.wait(min(1.0, self._seconds / 4)):
            idle = time.monotonic() - self._last
            if idle > self._seconds:
                self._end(
                    f"rank {self._rank} made no progress for {idle:.0f} s (faults.hang_seconds) in: {self._doing}"
                )
            if self._last != seen and time.monotonic() - armed > self._seconds / 10:
                armed, seen = time.monotonic(), self._last
                self._arm()

    def _end(self, what: str) -> None:
        """Show the stacks and end the process. Should the disk hang as well, faulthandler's own time runs out."""
        print(f"{what}. This is where each of its threads stands:", file=_STDERR, flush=True)
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        path = self._run / f"hung_rank{self._rank}.txt"
        with contextlib.suppress(OSError), path.open("w") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
        with contextlib.suppress(OSError), (self._run / folder.LOG_FILE).open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}; the stacks of its threads are in {path}\n")
        os._exit(EXIT_CODE)
