"""Writing a folder of planned files: several at once, in bounded memory, all of it or nothing.

The folder is written beside its destination under another name, synced, and renamed at the end, so that a failure or a
kill leaves the destination as it was. Nothing is ever written elsewhere.
"""

import contextlib
import errno
import os
import resource
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from converters.streams import Reader
from converters.tensors import Flat, Tensor
from converters.torchfile import Part, Plan
from hybrid.errors import ConfigError, UserError

WORKERS = min(8, os.cpu_count() or 1)
"""Threads that read, convert and write; each holds a few blocks of `streams.BLOCK_BYTES`."""

_OTHER_FILES = 256  # what a process has open besides
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Progress:
    """How far the writing is: bytes and seconds."""

    done: int
    total: int
    seconds: float

    def __str__(self) -> str:
        left = f", {self.seconds_left:.0f} s left" if self.done < self.total else f" in {self.seconds:.1f} s"
        unit, factor = ("GB", 1e9) if self.total >= 1e9 else ("MB", 1e6)
        amount = f"{self.done / factor:.2f} of {self.total / factor:.2f} {unit}"
        return f"{amount} at {self.gigabytes_per_second:.2f} GB/s{left}"

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes written so far over the time it took, in 1e9 bytes a second."""
        return self.done / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        """Seconds to the end, at the speed so far."""
        return (self.total - self.done) * self.seconds / self.done if self.done else 0.0


Report = Callable[[Progress], None]


def total_bytes(files: dict[str, Plan]) -> int:
    """Bytes of all planned files."""
    return sum(plan.size for plan in files.values())


def refuse_existing(destination: Path) -> None:
    """Raise ConfigError if a destination exists, or is no name of a folder; an empty folder is taken."""
    try:
        taken = destination.is_symlink() or destination.is_file()
        taken = taken or (destination.is_dir() and any(destination.iterdir()))
    except OSError as error:
        raise _impossible(destination, error) from None
    if taken:
        raise ConfigError(f"{destination} exists already; name another destination, or remove it")


@contextmanager
def replacing(destination: Path, needed: int) -> Iterator[Path]:
    """Give a folder beside `destination` to write into; at the end it becomes `destination`, on an error it is removed.

    Folders above it that are missing are made, and are removed on an error, too. Raises ConfigError if the destination
    exists (an empty folder is taken) or no folder can be made there; UserError if the file system has less than
    `needed` bytes left, and, in one sentence, for whatever it says while it is written to.
    """
    refuse_existing(destination)
    parent = destination.absolute().parent
    made: list[Path] = []
    try:
        made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        room = shutil.disk_usage(made[-1].parent if made else parent).free
        if room < needed:
            raise UserError(
                f"{destination} needs {needed / 1e9:.2f} GB, but the disk under {parent} has {room / 1e9:.2f} GB left"
            )
        for missing in reversed(made):
            missing.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".part", dir=parent))
    except OSError as error:
        _remove_empty(made)
        if error.errno in _FULL:
            raise _full(destination) from None
        raise _impossible(destination, error) from None
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        if destination.is_dir():
            destination.rmdir()
        folder.rename(destination)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(made)
        if not isinstance(error, OSError):
            raise
        if error.errno in _FULL:
            raise _full(destination) from None
        raise UserError(f"{destination} cannot be written: {error.strerror or error}") from None


def write(folder: Path, files: dict[str, Plan], report: Report | None = None, workers: int = WORKERS) -> None:
    """Write the planned files, whose names are relative to `folder`, and sync them to the disk."""
    _allow_open_files(files)
    total = total_bytes(files)
    meter = _Meter(total, report)
    descriptors: dict[str, int] = {}
    sums: dict[str, dict[int, int]] = {name: {} for name in files}
    try:
        for name, plan in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptors[name] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.truncate(descriptors[name], plan.size)
        with Reader() as reader, ThreadPoolExecutor(workers) as pool:
            # Parts of different files take turns, so that every file grows at about the same time.
            turns = sorted(
                (part.offset / max(1, plan.size), name, index)
                for name, plan in files.items()
                for index, part in enumerate(plan.parts)
            )
            jobs = [
                pool.submit(_write_part, reader, descriptors[name], files[name].parts[index], sums[name], meter)
                for _, name, index in turns
            ]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                meter.stopped = True
                pool.shutdown(cancel_futures=True)
                raise
            for name, plan in files.items():
                for offset, data in plan.seal(sums[name]) if plan.seal else []:
                    _write_all(descriptors[name], memoryview(data), offset)
            list(pool.map(os.fsync, descriptors.values()))
        meter.add(total - meter.done)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def differences(folder: Path, files: dict[str, Plan], workers: int = WORKERS) -> list[str]:
    """Read the files again and compare all of them with what they were made from; return those that differ."""

    def differs(reader: Reader, path: Path, part: Part, sums: dict[int, int]) -> bool:
        crc = 0
        with open(path, "rb", buffering=0) as file:
            file.seek(part.offset)
            for block in _blocks(reader, part.content):
                if file.read(len(block)) != block:
                    return True
                crc = zlib.crc32(block, crc) if part.checked else 0
        sums[part.offset] = crc
        return False

    def differs_elsewhere(path: Path, plan: Plan, sums: dict[int, int]) -> bool:
        """In its length, or in what follows from the sums of its parts."""
        with open(path, "rb") as file:
            for offset, data in plan.seal(sums) if plan.seal else []:
                file.seek(offset)
                if file.read(len(data)) != data:
                    return True
        return path.stat().st_size != plan.size

    sums: dict[str, dict[int, int]] = {name: {} for name in files}
    with Reader() as reader, ThreadPoolExecutor(workers) as pool:
        jobs = [
            (name, pool.submit(differs, reader, folder / name, part, sums[name]))
            for name, plan in files.items()
            for part in plan.parts
        ]
        found = {name for name, job in jobs if job.result()}
    others = {name: plan for name, plan in files.items() if name not in found}
    return sorted(found | {name for name, plan in others.items() if differs_elsewhere(folder / name, plan, sums[name])})


class _Meter:
    """Counts bytes from several threads and reports about four times a second."""

    def __init__(self, total: int, report: Report | None):
        self.done = 0
        self.stopped = False
        self._total, self._report = total, report
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            now = time.monotonic()
            if self._report and (now - self._last > 0.25 or self.done == self._total):
                self._last = now
                self._report(Progress(self.done, self._total, now - self._start))


def _write_part(reader: Reader, descriptor: int, part: Part, sums: dict[int, int], meter: _Meter) -> None:
    offset = part.offset
    crc = 0
    for block in _blocks(reader, part.content):
        if meter.stopped:
            return
        if part.checked:
            crc = zlib.crc32(block, crc)
        _write_all(descriptor, block, offset)
        offset += len(block)
        meter.add(len(block))
    sums[part.offset] = crc


def _blocks(reader: Reader, content: Tensor | Flat | bytes) -> Iterator[memoryview]:
    return iter([memoryview(content)]) if isinstance(content, bytes) else reader.blocks(content)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _allow_open_files(files: dict[str, Plan]) -> None:
    """Every planned file is open at once, and every file that is read: raise the soft limit where it is too low."""
    contents = (part.content for plan in files.values() for part in plan.parts)
    sources = {file for content in contents if not isinstance(content, bytes) for file in content.files}
    count = len(files) + len(sources)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise UserError(
            f"{len(sources)} files to read and {len(files)} to write are open at once, but the limit is {hard}; raise "
            "it (ulimit -Hn), or convert into fewer files"
        )
    needed = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _impossible(destination: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{destination} cannot be written: {error.strerror or error}; name another destination")


def _full(destination: Path) -> UserError:
    return UserError(f"the disk is full; {destination} was not written, nothing was left behind")


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, up to one that something else lies in."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
