"""Writing a folder of planned files: several at once, in bounded memory, all of it or nothing.

The folder is written beside its destination under another name, synced, and renamed at the end, so that a failure or a
kill leaves the destination as it was. Nothing is ever written elsewhere.
"""

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
from hybrid.errors import UserError

WORKERS = min(8, os.cpu_count() or 1)
"""Threads that read, convert and write; each holds a few blocks of `streams.BLOCK_BYTES`."""


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


@contextmanager
def replacing(destination: Path, needed: int) -> Iterator[Path]:
    """Give a folder beside `destination` to write into; at the end it becomes `destination`, on an error it is removed.

    Raises UserError if the destination exists (an empty folder is taken), if the file system has less than `needed`
    bytes left, and, in one sentence, for whatever the file system says while it is written to.
    """
    if destination.is_symlink() or destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        raise UserError(f"{destination} exists already; name another destination, or remove it")
    parent = destination.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(parent).free
        if room < needed:
            raise UserError(
                f"{destination} needs {needed / 1e9:.2f} GB, but the disk under {parent} has {room / 1e9:.2f} GB left"
            )
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".part", dir=parent))
        try:
            folder.chmod(0o777 & ~_umask())
            yield folder
            if destination.is_dir():
                destination.rmdir()
            folder.rename(destination)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full; {destination} was not written, nothing was left behind") from None
        raise UserError(f"{destination} cannot be written: {error.strerror or error}") from None


def write(folder: Path, files: dict[str, Plan], report: Report | None = None, workers: int = WORKERS) -> None:
    """Write the planned files, whose names are relative to `folder`, and sync them to the disk."""
    _allow_open_files(len(files))
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
    """Read the files again and compare every part with what it was made from; return the files that differ."""

    def differs(reader: Reader, path: Path, part: Part) -> bool:
        with open(path, "rb", buffering=0) as file:
            file.seek(part.offset)
            for block in _blocks(reader, part.content):
                if file.read(len(block)) != block:
                    return True
        return False

    with Reader() as reader, ThreadPoolExecutor(workers) as pool:
        jobs = [(n, pool.submit(differs, reader, folder / n, part)) for n, plan in files.items() for part in plan.parts]
        return sorted({name for name, job in jobs if job.result()})


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


def _allow_open_files(count: int) -> None:
    """Every planned file is open at once, beside those that are read: raise the soft limit where it is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * count + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
