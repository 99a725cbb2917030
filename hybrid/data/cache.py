"""The folder for prepared data: complete folders appear in it at once, unfinished ones are never taken for them."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hybrid.config import DataConfig
from hybrid.errors import ConfigError, UserError

_UNFINISHED = ".unfinished"
_LITTER_SECONDS = 24 * 3600


def cache_folder(data: DataConfig) -> Path:
    """Return `data.cache`, or `hybrid-recipes` in the user's cache folder."""
    if data.cache:
        return Path(data.cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hybrid-recipes"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def clear_errors(folder: Path, way_out: str) -> Iterator[None]:
    """Turn a full disk or a missing permission into one sentence, a UserError or a ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise
        message = f"cannot write to '{folder}': {os.strerror(error.errno).lower()}; {way_out}"
        kind = UserError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError
        raise kind(message) from error


def make_folder(final: Path, fill: Callable[[Path], None]) -> Path:
    """Make the folder `final` by filling one beside it and renaming that.

    A process killed at any moment leaves nothing called `final`; of two that make it at once the first wins and the
    other's work is dropped. Raises UserError for a full disk or a missing permission.
    """
    with clear_errors(final.parent, "choose another folder with data.cache"):
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_litter(final.parent)
        beside = unfinished_name(final)
        beside.mkdir()
        try:
            fill(beside)
            adopt(beside, final)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    return final


def unfinished_name(final: Path) -> Path:
    """Return a path beside `final` that no other process uses."""
    return final.with_name(f"{final.name}.{os.uname().nodename}-{os.getpid()}-{time.monotonic_ns()}{_UNFINISHED}")


def adopt(beside: Path, final: Path) -> None:
    """Rename `beside` to `final`; drop it when another process was first."""
    try:
        beside.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(beside, ignore_errors=True)


def remove_litter(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder` more than a day ago."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        try:
            if time.time() - path.stat().st_mtime > _LITTER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
