"""Signals that ask a run to save and stop at the end of its step.

Ctrl-C (SIGINT), SIGTERM (kill, Slurm at the end of a job or before preemption) and SIGUSR1 (Slurm's warning before
the time limit, see `recipes/executors.py`). Ctrl-C after any of them stops the run at once. The other two may come
several times for one reason, from Slurm and from torchrun; and so may Ctrl-C, at nearly the same time, from a terminal
and from a launcher that passes it on (`timeout`, `uv run`).
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

SAME_SECONDS = 0.5  # between two signals of one reason; a person who wants to end a run at once tries again
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Let these signals end the process with the exit code of `Interrupt.exit`: before and after the steps, when there
    is nothing to save. Also where an import that was interrupted fails in a way of its own."""
    received = 0

    def end(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = number
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    except Exception as error:
        if received:
            raise SystemExit(128 + received) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupt:
    """While entered, the first of these signals only sets `wanted`, and `says` so on stderr. Ctrl-C after it ends the
    run unsaved: with the exit code of an interrupted one if it is `alone`. One of several ranks dies of it, since to
    leave their groups in order it would wait for the others.
    """

    def __init__(self, *, alone: bool, says: bool) -> None:
        self.wanted = False
        self._alone, self._says = alone, says
        self._since = 0.0
        self._signal = signal.SIGINT
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.wanted and number == signal.SIGINT and time.monotonic() - self._since > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            if self._alone:
                raise self.exit()
            signal.raise_signal(number)
        if not self.wanted:
            self._signal, self._since = signal.Signals(number), time.monotonic()
            if self._says:  # past Python's own buffers, which this may have interrupted
                line = f"{self._signal.name}: saves after this step and stops; Ctrl-C again stops at once, unsaved"
                with suppress(OSError):  # nobody may be reading any more
                    os.write(2, f"\n{line}\n".encode())
        self.wanted = True

    def exit(self) -> SystemExit:
        """The exit that says which signal ended the run, as shells say it: 128 + its number."""
        return SystemExit(128 + self._signal)
