"""How far a preparation is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS_BETWEEN_LINES = 30


@contextmanager
def byte_progress(title: str, total: int, quiet: bool, start: int = 0) -> Iterator[Callable[[int], None]]:
    """Show bytes done, MB/s and the time left on stderr while the block runs; yield what adds bytes.

    `start` bytes were done before.
    """
    if quiet:
        yield lambda advance: None
        return
    if not sys.stderr.isatty():
        yield _lines(title, total, start)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total, completed=start)
        yield lambda advance: progress.advance(task, advance)


def _lines(title: str, total: int, start: int) -> Callable[[int], None]:
    began = said = time.monotonic()
    done = start

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        now = time.monotonic()
        if now - said < _SECONDS_BETWEEN_LINES:
            return
        said = now
        speed = (done - start) / (now - began)
        left = f", {(total - done) / speed / 60:.0f} min left" if speed else ""
        print(f"{title}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s{left}", file=sys.stderr)

    return advance
