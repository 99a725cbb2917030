"""Which text files make a corpus, and which of them are held out."""

import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hybrid.config import DataConfig
from hybrid.errors import ConfigError, Problem

SPLITS = ("train", "validation", "test")

# Other people's packages, and tests: distributions of Python differ in whether they bring the latter.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
SNIFF_BYTES = 8192


@dataclass(frozen=True)
class SourceFile:
    """A text file: `name` relative to the corpus' folder with `/` between parts, size in bytes, time of change."""

    name: str
    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Piece:
    """A file, or the share of it from `start` to `stop`, cut at the ends of lines."""

    file: SourceFile
    start: float = 0.0
    stop: float = 1.0

    def cut(self, text: bytes) -> bytes:
        """Return this piece of the file's bytes."""
        return text[_line_end(text, self.start) : _line_end(text, self.stop)]


@dataclass
class Files:
    """The text files of a folder in the order of their names, and how many others there were, by reason."""

    folder: Path
    found: list[SourceFile]
    skipped: Counter[str] = field(default_factory=Counter)


def find_files(data: DataConfig) -> Files:
    """Find the text files that `data.source` "stdlib" or "text" names.

    A file is text when its beginning is UTF-8 without NUL. Hidden files and folders are passed over; empty, unreadable
    and non-text files are counted. Raises ConfigError when the folder is missing, unreadable or without text.
    """
    if data.source == "stdlib":
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = _scan(folder, lambda name: name.endswith(".py") and not name.startswith("_sysconfigdata"), _NOT_STDLIB)
        if not files.found:
            raise ConfigError(
                Problem("data.source", f"this Python has no library sources in '{folder}': use data.source=text")
            )
        return files
    if not data.path:
        raise ConfigError(Problem("data.path", "data.source=text needs a folder of text files: set data.path"))
    folder = folder_of(data.path)
    files = _scan(folder, lambda name: True, set())
    if not files.found:
        others = f" ({describe_skipped(files.skipped)})" if files.skipped else ""
        raise ConfigError(Problem("data.path", f"there are no text files in '{folder}'{others}"))
    return files


def folder_of(path: str) -> Path:
    """The folder that data.path names. Raises ConfigError when it is missing, a file or cannot be read."""
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ConfigError(Problem("data.path", f"'{folder}' is a file: give the folder it is in"))
    if not folder.is_dir():
        raise ConfigError(Problem("data.path", f"there is no folder '{folder}'"))
    try:
        next(os.scandir(folder), None)
    except OSError as error:
        raise ConfigError(Problem("data.path", f"the folder '{folder}' cannot be read: {error.strerror}")) from error
    return folder


def describe_skipped(skipped: Counter[str]) -> str:
    """Return such as "2 files empty, 1 file not UTF-8 text"."""
    return ", ".join(
        f"{count} {'file' if count == 1 else 'files'} {reason}" for reason, count in sorted(skipped.items())
    )


def _scan(folder: Path, wanted, passed_over: set[str]) -> Files:
    files = Files(folder, [])
    for path in _walk(folder, passed_over):
        if not wanted(path.name):
            continue
        try:
            status = path.stat()
            with path.open("rb") as file:
                head = file.read(SNIFF_BYTES)
        except OSError:
            files.skipped["unreadable"] += 1
            continue
        if not head:
            files.skipped["empty"] += 1
        elif not looks_like_text(head, whole=len(head) == status.st_size):
            files.skipped["not UTF-8 text"] += 1
        else:
            name = path.relative_to(folder).as_posix()
            files.found.append(SourceFile(name, path, status.st_size, status.st_mtime_ns))
    files.found.sort(key=lambda file: file.name)
    return files


def _walk(folder: Path, passed_over: set[str]) -> Iterator[Path]:
    """Yield the paths of all files, following links to folders once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in passed_over)
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and (path.is_file() or path.is_symlink()):
                yield path


def looks_like_text(head: bytes, whole: bool) -> bool:
    """Whether the beginning of a file, or the whole of it, is UTF-8 without NUL."""
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last character of a beginning may be cut.
        return not whole and error.start > len(head) - 4 and error.reason == "unexpected end of data"
    return True


def normalized(split: list[float]) -> list[float]:
    """Return `data.split` with a sum of 1. Raises ConfigError when it is not three shares, the first above 0."""
    if len(split) != 3 or not all(0 <= share < float("inf") for share in split) or split[0] == 0:
        message = f"{split} are not three shares of training, validation and test, the first above 0"
        raise ConfigError(Problem("data.split", message))
    return [share / sum(split) for share in split]


def split_files(files: list[SourceFile], split: list[float]) -> dict[str, list[Piece]]:
    """Deal the files out to "train", "validation" and "test" by shares of their bytes.

    The order of dealing comes from a hash of each file's name, so it is the same on every machine. A split takes a file
    when it fits in what its share has left; a share that is smaller than every file takes the smallest. Where there are
    fewer files than splits, each file is cut instead, at the ends of lines. Raises ConfigError for impossible shares.
    """
    shares = normalized(split)
    if len(files) < sum(share > 0 for share in shares):
        return _cut_files(files, shares)
    left = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    total = sum(file.size for file in files)
    result: dict[str, list[Piece]] = {name: [] for name in SPLITS}
    waiting = sum(share > 0 for share in shares)
    for name, share in zip(SPLITS[1:], shares[1:], strict=True):
        if share == 0:
            continue
        waiting -= 1
        room, taken = share * total, []
        for file in left:
            if file.size <= room and len(taken) < len(left) - waiting:
                room -= file.size
                taken.append(file)
        taken = taken or [min(left, key=lambda file: file.size)]
        left = [file for file in left if file not in set(taken)]
        result[name] = [Piece(file) for file in taken]
    result["train"] = [Piece(file) for file in left]
    return {name: sorted(pieces, key=lambda piece: piece.file.name) for name, pieces in result.items()}


def _cut_files(files: list[SourceFile], shares: list[float]) -> dict[str, list[Piece]]:
    edges = [0.0, shares[0], shares[0] + shares[1], 1.0]
    return {
        name: [Piece(file, edges[i], edges[i + 1]) for file in files] if shares[i] else []
        for i, name in enumerate(SPLITS)
    }


def _line_end(text: bytes, share: float) -> int:
    """Byte after the end of the line in which `share` of the text ends; without further lines, of the character."""
    at = int(share * len(text))
    if at in (0, len(text)):
        return at
    end = text.find(b"\n", at - 1) + 1
    if 0 < end < len(text):
        return end
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at
