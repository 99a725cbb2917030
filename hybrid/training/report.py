"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, `metrics.jsonl` and `log.txt`."""

import json
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hybrid.training.folder import LOG_FILE, METRICS_FILE

# Steps over which tokens/s and the time left are averaged.
_WINDOW = 20
# Seconds between two lines of progress where there is no terminal.
_LINE_SECONDS = 10.0


class Report:
    """Says how a run goes; a context manager. On ranks other than the first it says nothing and writes nothing."""

    def __init__(self, folder: Path, total_steps: int, start_step: int, tokens_per_step: int, *, speaks: bool):
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self.speaks = speaks
        self._ends: deque[float] = deque([time.monotonic()], maxlen=_WINDOW + 1)
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if not speaks:
            return
        keep_lines_up_to(folder / METRICS_FILE, start_step)
        self._metrics = (folder / METRICS_FILE).open("a", buffering=1)
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
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, text="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        if self.speaks:
            self._metrics.close()
            self._log.close()

    def say(self, text: str) -> None:
        """Print a line and keep it in log.txt."""
        if self.speaks:
            self._console.print(text, markup=False)
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def step(self, step: int, values: dict[str, Any], *, write: bool) -> None:
        """One optimizer step has ended; `values` has at least loss and lr. `write`: whether metrics.jsonl takes it."""
        now = time.monotonic()
        seconds = now - self._ends[-1]
        self._ends.append(now)
        if not self.speaks:
            return
        speed = (len(self._ends) - 1) * self.tokens_per_step / (now - self._ends[0])
        if write:
            self._write(
                {"step": step, **values, "tokens_per_second": self.tokens_per_step / seconds, "step_seconds": seconds}
            )
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {speed:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif now - self._last_line > _LINE_SECONDS or step == self.total_steps:
            self._last_line = now
            left = (self.total_steps - step) * (now - self._ends[0]) / (len(self._ends) - 1)
            self.say(f"step {step}/{self.total_steps}  {text}  {_duration(left)} left")

    def validation(self, step: int, name: str, loss: float, bits_per_byte: float) -> None:
        """A held-out set has been read."""
        self.say(f"step {step}: {name} loss {loss:.4f}, {bits_per_byte:.3f} bits per byte")
        if self.speaks:
            self._write({"step": step, f"{name}_loss": loss, f"{name}_bits_per_byte": bits_per_byte})
        self.pause()

    def pause(self) -> None:
        """What came since the last step is no part of the next one's time."""
        self._ends = deque([time.monotonic()], maxlen=_WINDOW + 1)

    def _write(self, values: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(values) + "\n")


def keep_lines_up_to(metrics: Path, step: int) -> None:
    """Drop what a run recorded after the checkpoint it now goes on from, a line cut off by a kill included."""
    if not metrics.is_file():
        return
    kept = []
    for line in metrics.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    beside = metrics.with_suffix(".new")
    beside.write_text("".join(kept))
    beside.replace(metrics)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
