"""Checksums of a checkpoint's files: written when all of them are there, asked before any of them is read.

CRC-32 over blocks of 64 MiB, several at a time: what finds a file that is cut off, or a disk's or network's error, as
fast as it can be read. It is no protection against somebody who means to deceive. Imports no torch.
"""

import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FILE_NAME = "checksums.json"
_BLOCK = 64 * 2**20
_THREADS = 8


def of(path: Path) -> dict[str, Any]:
    """The size of a file in bytes and the CRC-32 of each of its blocks. Raises OSError if it cannot be read."""
    size = path.stat().st_size
    with path.open("rb") as file, ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        sums = pool.map(lambda start: _block(file.fileno(), start), range(0, size, _BLOCK))
        return {"bytes": size, "crc32": [f"{value:08x}" for value in sums]}


def write(folder: Path, known: dict[str, dict[str, Any]]) -> int:
    """Write the manifest of all files in a folder; returns their bytes. `known` has sums that were made already."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != FILE_NAME]
    names = {str(path.relative_to(folder)): path for path in files}
    sums = {name: known.get(name) or of(path) for name, path in sorted(names.items())}
    with (folder / FILE_NAME).open("w") as file:
        json.dump({"algorithm": "crc32", "block_bytes": _BLOCK, "files": sums}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return sum(entry["bytes"] for entry in sums.values())


def damage(folder: Path, share: int = 0, shares: int = 1) -> str:
    """What is wrong with the files of a folder, in words; empty if they are as they were written, or have no manifest.

    Of the files' contents, reads only the `share`-th of `shares`, so that the ranks of a run can share the work; names
    and sizes are looked at by all.
    """
    manifest = folder / FILE_NAME
    if not manifest.is_file():
        return ""
    try:
        files = json.loads(manifest.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{FILE_NAME} cannot be read"
    return next(_wrong(folder, files, share, shares), "")


def _wrong(folder: Path, files: dict[str, dict[str, Any]], share: int, shares: int) -> Iterator[str]:
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            yield f"{name} is missing"
            continue
        if size != entry["bytes"]:
            yield f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
    largest_first = sorted(files, key=lambda name: -files[name]["bytes"])
    for name in largest_first[share::shares]:
        try:
            if of(folder / name)["crc32"] != files[name]["crc32"]:
                yield f"the checksum of {name} is another one than when it was written"
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"


def _block(descriptor: int, start: int) -> int:
    value, left = 0, _BLOCK
    while left and (data := os.pread(descriptor, min(left, 4 * 2**20), start)):
        value, left, start = zlib.crc32(data, value), left - len(data), start + len(data)
    return value
