"""Files that torch.save writes: read without loading their storages, and planned so that they can be streamed.

Such a file is a zip archive without compression: `NAME/data.pkl` holds the objects, `NAME/data/KEY` the bytes of each
storage (torch/serialization.py, caffe2/serialize/inline_container.cc). A file can also lie inside another, as the
tensors of a torch_dist checkpoint do.
"""

import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from converters import pickles
from converters.pickles import STORAGES, StorageName
from converters.tensors import ITEM_SIZES, Blob, Flat, Tensor, stored
from hybrid.errors import CheckpointError

ALIGNMENT = 64
"""Where the bytes of a storage begin, as torch does it, so that they can be mapped into memory."""

_STORAGE_OF = {dtype: kind for kind, dtype in STORAGES.items() if kind != "UntypedStorage"}
_LIMIT32 = 0xFFFFFFFF
_IN_EXTRA = 0xFFFFFFFF
# From the limit on, a size or offset is in the extra field, and the ordinary field says so.


class _Window(io.RawIOBase):
    """The bytes [start, start + length) of a file, as a file."""

    def __init__(self, path: Path, start: int, length: int):
        super().__init__()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
        self._start, self._length, self._place = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._length)[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._place)]
        self._file.seek(self._start + self._place)
        count = self._file.readinto(view) or 0
        self._place += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of a file, by default `path`, what the file system says while it is read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None


def load(path: Path, allow: Iterable[str] = (), start: int = 0, length: int | None = None) -> Any:
    """Return the objects of the file that torch.save wrote at `path` (or in `length` bytes of it from `start` on).

    Its tensors are `Tensor`s that still lie in the file. Raises CheckpointError if it is damaged, no such file, or of
    before torch 1.6; `pickles.ForeignPickle` if it names what is not on the list of `converters.pickles`.
    """
    size = path.stat().st_size - start if length is None else length
    if start + size > path.stat().st_size:
        raise CheckpointError(f"{path} is truncated: it has {path.stat().st_size} bytes, {start + size} are needed")
    with io.BufferedReader(_Window(path, start, size)) as file:
        try:
            archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile:
            raise _no_archive(path, file) from None
        with archive:
            records = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}

            def place(info: zipfile.ZipInfo) -> int:
                if info.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path}: {info.filename} is compressed, which torch.save does not do")
                file.seek(info.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                return info.header_offset + 30 + name_length + extra_length

            def content(info: zipfile.ZipInfo) -> bytes:
                # Not by zipfile, which checks the CRC: torch can be told to leave it out.
                file.seek(place(info))
                return file.read(info.file_size)

            if "data.pkl" not in records:
                raise CheckpointError(f"{path} is a zip file, but torch.save did not write it: it has no data.pkl")
            if "byteorder" in records and content(records["byteorder"]) != b"little":
                raise CheckpointError(f"{path} was written on a big-endian machine, whose number formats are not read")

            def storage(key: str, dtype: str, count: int) -> Tensor:
                info = records[f"data/{key}"]
                nbytes = count * (1 if dtype == "uint8" else ITEM_SIZES[dtype])
                if info.file_size != nbytes:
                    raise ValueError(f"storage {key} has {info.file_size} bytes, {nbytes} were announced")
                return stored(path, start + place(info), (count,), dtype)

            return pickles.load(content(records["data.pkl"]), str(path), storage, allow)


def elements(blob: Blob) -> int:
    """The byte of the blob's file at which its tensor's elements begin. CheckpointError if it is anything else."""
    content = load(blob.path, (), blob.start, blob.length)
    if not isinstance(content, Tensor) or len(content.pieces) != 1 or not content.pieces[0].contiguous:
        raise CheckpointError(f"{blob.path}: the {blob.length} bytes from {blob.start} on are no contiguous tensor")
    return content.pieces[0].offset


def _no_archive(path: Path, file: IO[bytes]) -> CheckpointError:
    file.seek(0)
    head = file.read(4)
    if head.startswith(b"PK"):
        return CheckpointError(f"{path} is truncated: the index at its end is missing")
    if head.startswith(b"\x80\x02\x8a\x0a"):
        return CheckpointError(
            f"{path} is of torch before 1.6, which is not read; load it with torch and save it again: "
            "torch.save(torch.load(PATH), NEW)"
        )
    return CheckpointError(f"{path} is not a file of torch.save")


@dataclass(frozen=True)
class Part:
    """Bytes of a planned file: a tensor or bytes, at an offset. `checked`: the file wants to know their CRC-32."""

    offset: int
    content: Tensor | Flat | bytes
    checked: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes


@dataclass(frozen=True)
class Plan:
    """A file, or a stretch of one, before it is written: parts, and what follows from the CRCs of the checked ones.

    `seal` is given the CRC-32 of each checked part by offset and returns the rest as (offset, bytes).
    """

    size: int
    parts: list[Part]
    seal: Callable[[dict[int, int]], list[tuple[int, bytes]]] | None = None


Files = dict[str, Plan]
"""Planned files by name in their folder."""


def bytes_plan(content: bytes) -> Plan:
    """A file of these bytes."""
    return Plan(len(content), [Part(0, content)])


def plan(value: Any, start: int = 0) -> Plan:
    """Plan the file that torch.save would write for `value`, which holds `Tensor`s, from byte `start` of a file on.

    Every tensor gets a storage of its own that holds its elements and no others.
    """
    storages: list[Tensor | Flat] = []
    keys: dict[int, StorageName] = {}

    def storage(tensor: Tensor | Flat) -> StorageName:
        # The same object twice (tied weights) is one storage.
        if id(tensor) not in keys:
            kind = _STORAGE_OF.get(tensor.dtype, "UntypedStorage")
            count = tensor.nbytes if kind == "UntypedStorage" else tensor.size
            keys[id(tensor)] = StorageName(kind, str(len(storages)), count)
            storages.append(tensor)
        return keys[id(tensor)]

    pickle = pickles.dump(value, storage)
    contents: list[tuple[str, Tensor | Flat | bytes]] = [
        ("data.pkl", pickle),
        (".format_version", b"1"),
        (".storage_alignment", str(ALIGNMENT).encode()),
        ("byteorder", b"little"),
        *((f"data/{index}", tensor) for index, tensor in enumerate(storages)),
        ("version", b"3\n"),
    ]
    parts: list[Part] = []
    entries: list[_Entry] = []
    offset = start
    for name, content in contents:
        nbytes = len(content) if isinstance(content, bytes) else content.nbytes
        entry = _Entry(f"archive/{name}".encode(), offset - start, nbytes)
        parts.append(Part(offset + entry.header_size, content, checked=True))
        entries.append(entry)
        offset += entry.header_size + nbytes
    index_offset = offset
    index_size = sum(len(entry.index(0)) for entry in entries)
    end = _end(len(entries), index_size, index_offset - start)

    def seal(sums: dict[int, int]) -> list[tuple[int, bytes]]:
        crcs = [sums[part.offset] for part in parts]
        headers = [(start + entry.offset, entry.header(crc)) for entry, crc in zip(entries, crcs, strict=True)]
        index = b"".join(entry.index(crc) for entry, crc in zip(entries, crcs, strict=True))
        return [*headers, (index_offset, index + end)]

    return Plan(index_offset - start + index_size + len(end), parts, seal)


def joined(plans: list[Plan]) -> Plan:
    """Stretches of one file that follow one another, as one."""

    def seal(sums: dict[int, int]) -> list[tuple[int, bytes]]:
        return [item for plan in plans if plan.seal for item in plan.seal(sums)]

    return Plan(sum(plan.size for plan in plans), [part for plan in plans for part in plan.parts], seal)


@dataclass(frozen=True)
class _Entry:
    """A file in a zip archive: APPNOTE.TXT 4.3.7 (header) and 4.3.12 (index), without compression."""

    name: bytes
    offset: int
    nbytes: int

    @property
    def header_size(self) -> int:
        return len(self.header(0))

    def header(self, crc: int) -> bytes:
        large = self.nbytes >= _LIMIT32
        extra = struct.pack("<HHQQ", 1, 16, self.nbytes, self.nbytes) if large else b""
        # torch pads with a field 'FB' so that the bytes that follow are aligned (in the file, not in the archive).
        used = self.offset + 30 + len(self.name) + len(extra) + 4
        padding = -used % ALIGNMENT
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        size = _IN_EXTRA if large else self.nbytes
        head = struct.pack("<4s5H3I2H", b"PK\x03\x04", 45 if large else 0, 0, 0, 0, 0, crc, size, size,
                           len(self.name), len(extra))  # fmt: skip
        return head + self.name + extra

    def index(self, crc: int) -> bytes:
        sizes = [self.nbytes, self.nbytes] if self.nbytes >= _LIMIT32 else []
        offsets = [self.offset] if self.offset >= _LIMIT32 else []
        values = [*sizes, *offsets]
        extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        size = _IN_EXTRA if sizes else self.nbytes
        head = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 45, 45 if values else 0, 0, 0, 0, 0, crc, size, size,
                           len(self.name), len(extra), 0, 0, 0, 0,
                           _IN_EXTRA if offsets else self.offset)  # fmt: skip
        return head + self.name + extra


def _end(count: int, size: int, offset: int) -> bytes:
    """The end of a zip archive: 4.3.14 to 4.3.16, the long form only where the short one has no room."""
    long = count >= 0xFFFF or size >= _LIMIT32 or offset >= _LIMIT32
    result = b""
    if long:
        result += struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
        result += struct.pack("<4sIQI", b"PK\x06\x07", 0, offset + size, 1)
    short = (0xFFFF, _IN_EXTRA, _IN_EXTRA) if long else (count, size, offset)
    return result + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, short[0], short[0], short[1], short[2], 0)
