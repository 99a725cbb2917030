"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere; `metrics.jsonl` and `log.txt`.

Both stay bounded however long a run is: the lines come at growing distances, and when metrics.jsonl has grown large,
only every second, fourth, eighth... step of its older half is kept.
"""

import json
import math
import time
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hybrid import atomic
from hybrid.errors import UserError
from hybrid.training.folder import LOG_FILE, METRICS_FILE

# Steps over which tokens/s and the time left are averaged.
_WINDOW = 20
# Seconds between two lines of progress (of log.txt, on a terminal): the first, the longest, and as a share of the run.
_LINE_SECONDS, _LONGEST_LINE_SECONDS, _LINE_SHARE = 10.0, 300.0, 0.01
# Bytes of metrics.jsonl from which on it is thinned out.
METRICS_BYTES = 64 * 2**20


class Sink(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Take the values of a step, a validation or a save."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


class Report:
    """Says how a run goes; a context manager. On ranks other than the first it says nothing and writes nothing."""

    def __init__(self, folder: Path, total_steps: int, *, speaks: bool, metrics_bytes: int = METRICS_BYTES):
        self.total_steps, self.speaks = total_steps, speaks
        self.sinks: Sequence[Sink] = ()
        self._path, self._limit = folder / METRICS_FILE, metrics_bytes
        self._recent: deque[tuple[float, float]] = deque(maxlen=_WINDOW)  # tokens and seconds of a step
        self._began = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if not speaks:
            return
        self._metrics = self._path.open("a", buffering=1)
        self._log = (folder / LOG_FILE).open("a", buffering=1)
        self._console = Console(highlight=False, soft_wrap=True)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total_steps, text="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        for sink in self.sinks:
            sink.close()
        if self.speaks:
            if isinstance(error, Exception):  # who asks for a stop gets SystemExit, and has been told
                lines = [str(error)] if isinstance(error, UserError) else traceback.format_exception(error)
                _keep(self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} failed: {''.join(lines).rstrip()}\n")
            self._metrics.close()
            self._log.close()

    def say(self, text: str) -> None:
        """Print a line and keep it in log.txt."""
        if self.speaks:
            self._console.print(text, markup=False)
            self._note(text)

    def end(self, text: str) -> None:
        """Say the last word on the steps: under the bar, which would be drawn once more after it."""
        if self._bar:
            self._bar.stop()
        self.say(text)

    def _note(self, text: str) -> None:
        _keep(self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def begin(self, step: int) -> None:
        """The run goes on after a step: what was recorded of later ones is dropped."""
        if not self.speaks:
            return
        self._metrics.close()
        _rewrite(self._path, keep_lines_up_to(self._path, step))
        self._metrics = self._path.open("a", buffering=1)
        if self._bar:
            self._bar.update(self._task, completed=step)
            self._bar.start()

    def step(self, step: int, values: dict[str, Any], tokens: float, seconds: float, *, write: bool) -> None:
        """One optimizer step has ended; `values` has at least loss and lr. `write`: whether metrics.jsonl takes it."""
        if not self.speaks:
            return
        self._recent.append((tokens, seconds))
        spent = sum(seconds for _, seconds in self._recent)
        if write:
            self.write(step, values)
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
        text += f"{sum(tokens for tokens, _ in self._recent) / spent:,.0f} tokens/s"
        if "mfu" in values:
            text += f"  MFU {values['mfu']:.1%}"
        now = time.monotonic()
        distance = min(_LONGEST_LINE_SECONDS, max(_LINE_SECONDS, _LINE_SHARE * (now - self._began)))
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        if now - self._last_line > distance or step == self.total_steps:
            self._last_line = now
            left = (self.total_steps - step) * spent / len(self._recent)
            line = f"step {step}/{self.total_steps}  {text}  {_duration(left)} left"
            self._note(line) if self._bar else self.say(line)

    def validation(self, step: int, name: str, loss: float, bits_per_byte: float) -> None:
        """A held-out set has been read."""
        self.say(f"step {step}: {name} loss {loss:.4f}, {bits_per_byte:.3f} bits per byte")
        self.write(step, {f"{name}_loss": loss, f"{name}_bits_per_byte": bits_per_byte})

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record values of a step; a number that JSON does not know becomes null."""
        if not self.speaks:
            return
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        _keep(self._metrics, json.dumps({"step": step, **plain}) + "\n")
        for sink in self.sinks:
            sink.write(step, plain)
        if self._metrics.tell() > self._limit:
            self._metrics.close()
            _rewrite(self._path, thinned(self._path))
            self._metrics = self._path.open("a", buffering=1)


def keep_lines_up_to(metrics: Path, step: int) -> list[str]:
    """The lines up to a step: not what a run recorded after the checkpoint it now goes on from, nor half a line."""
    kept = []
    for line in metrics.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def thinned(metrics: Path) -> list[str]:
    """The lines without half or more of the steps of the older half, evenly; validations and saves all stay."""
    lines = metrics.read_text().splitlines(keepends=True)
    numbers = [number for number, line in enumerate(lines) if '"loss"' in line]
    older = {number: json.loads(lines[number])["step"] for number in numbers[: len(numbers) // 2]}
    stride = 2
    while sum(step % stride == 0 for step in older.values()) > len(older) / 2:
        stride *= 2
    return [line for number, line in enumerate(lines) if older.get(number, 0) % stride == 0]


def _rewrite(path: Path, lines: list[str]) -> None:
    try:
        atomic.write_text(path, "".join(lines))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; earlier checkpoints are intact") from None


def _keep(file: Any, text: str) -> None:
    """Write a line. Raises UserError if the disk is full."""
    try:
        file.write(text)
    except OSError as error:
        raise UserError(f"{file.name}: cannot be written: {error.strerror}; earlier checkpoints are intact") from None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
