"""Text, JSONL and Parquet files as documents, block by block."""

import gzip
import io
import json
import os
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hybrid.data.corpus import SNIFF_BYTES, describe_skipped, looks_like_text
from hybrid.data.encode import BLOCK_BYTES, Block, Document, Texts
from hybrid.errors import ConfigError, Problem, UserError, nearest

OUTPUT_ENDS = (".bin", ".idx", ".json", ".unfinished/")
_COMPRESSED = (".gz", ".zst")
_JSON = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class InputFile:
    """A file of documents: `kind` is "text", "jsonl" or "parquet"; `size` in bytes as it lies on the disk."""

    path: Path
    kind: str
    size: int
    mtime_ns: int

    @property
    def compressed(self) -> bool:
        """Whether the file is gzip or zstd."""
        return self.path.suffix in _COMPRESSED


class BadDocument(UserError):
    """A document that cannot be read: file, line or row, and why."""

    exit_code = 2  # the input is wrong, as it is when a file is missing

    def __init__(self, path: Path, where: str, reason: str):
        super().__init__(path, where, reason)

    def __str__(self) -> str:
        path, where, reason = self.args
        return f"'{path}', {where}: {reason}"


def find_inputs(
    names: list[str], place: str = "INPUT", left_out: Counter[str] | None = None, output: Path | None = None
) -> list[InputFile]:
    """Return the files, and the files of the folders, in the order given and by name within a folder.

    `.jsonl`, `.json` and `.ndjson` are JSON lines, `.parquet` is Parquet, any other file is one document of text; all
    but Parquet may be compressed (`.gz`, `.zst`). With `left_out`, files of a folder that are empty or, being of no
    known kind, not text are passed over and counted there, by the reason. What a preparation to the prefix `output` has
    written into a folder is none of its files. Raises ConfigError for all else that is
    missing, unreadable or empty.
    """
    files: list[InputFile] = []
    problems: list[Problem] = []
    written = () if output is None else tuple(f"{output.resolve()}{end}" for end in OUTPUT_ENDS)
    for name in names:
        path = Path(name).expanduser()
        passed_over = left_out if path.is_dir() else None
        before = len(files) + len(problems)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
            found = [p for p in found if not str(p.resolve()).startswith(written)] if written else found
        else:
            found = [path]
        for each in found:
            kind = _kind(each)
            try:
                with each.open("rb") as file:
                    head, status = file.read(SNIFF_BYTES), each.stat()
            except OSError as error:
                problems.append(Problem(place, f"'{each}' cannot be read: {os.strerror(error.errno or 0).lower()}"))
                continue
            plain = kind == "text" and each.suffix not in _COMPRESSED
            if passed_over is not None and not head:
                passed_over["empty"] += 1
            elif passed_over is not None and plain and not looks_like_text(head, len(head) == status.st_size):
                passed_over["not UTF-8 text"] += 1
            elif not head:
                problems.append(Problem(place, f"'{each}' is empty"))
            else:
                files.append(InputFile(each.resolve(), kind, status.st_size, status.st_mtime_ns))
        if path.is_dir() and len(files) + len(problems) == before:
            others = f" that can be used ({describe_skipped(passed_over)})" if passed_over else ""
            problems.append(Problem(place, f"the folder '{name}' holds no files{others}"))
    if problems:
        raise ConfigError(problems)
    return files


def example_files(paths: str, place: str) -> list[InputFile]:
    """The files of examples in one setting: paths separated by spaces, as in a shell.

    Raises ConfigError as `find_inputs`, for quotation marks left open, and for files that hold no records.
    """
    try:
        names = shlex.split(paths)
    except ValueError as error:
        raise ConfigError(Problem(place, f"'{paths}' opens a quotation mark and does not close it")) from error
    files = find_inputs(names, place)
    message = "is neither JSON lines (.jsonl, .json, .ndjson) nor .parquet"
    if problems := [Problem(place, f"'{file.path}' {message}") for file in files if file.kind == "text"]:
        raise ConfigError(problems)
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind(path: Path) -> str:
    suffix = path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix
    if suffix in _JSON:
        return "jsonl"
    return "parquet" if suffix == ".parquet" else "text"


# What makes a document of a JSON object or a row of a table; it raises ValueError, which says what is wrong with it.
Pick = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Text:
    """Picks the text, or list of texts, under a key."""

    key: str

    def __call__(self, record: dict[str, Any]) -> Document:
        """Return the document of a record. Raises ValueError."""
        if self.key not in record:
            raise ValueError(_missing_key(self.key, list(record)))
        return _text(record[self.key], self.key)


def read_blocks(files: list[InputFile], pick: Pick) -> Iterator[Block]:
    """Yield the documents of the files as blocks; the same ones every time.

    A text file is a document as it is, `pick` makes one of every other record. Workers read plain files themselves;
    compressed lines and Parquet are unpacked here and sent to them.
    """
    texts: list[Path] = []
    for file in files:
        if file.kind == "text":
            texts.append(file.path)
            if sum(path.stat().st_size for path in texts) >= BLOCK_BYTES:
                yield TextFiles(texts)
                texts = []
            continue
        if texts:
            yield TextFiles(texts)
            texts = []
        if file.kind == "parquet":
            yield from _parquet_blocks(file, pick)
        elif file.compressed:
            yield from _compressed_blocks(file, pick)
        else:
            for start in range(0, file.size, BLOCK_BYTES):
                yield LinesBetween(file.path, pick, start, min(start + BLOCK_BYTES, file.size))
    if texts:
        yield TextFiles(texts)


@dataclass(frozen=True)
class TextFiles:
    """Files that are one document each."""

    paths: list[Path]

    @property
    def source_bytes(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.paths)

    def documents(self) -> Iterable[Document]:
        """Read the files. Raises BadDocument for one that is not UTF-8 or cannot be unpacked."""
        for path in self.paths:
            try:
                with _open(path) as file:
                    text = file.read()
            except (OSError, EOFError, zlib.error, *_zstd_errors()) as error:
                raise BadDocument(path, "whole file", f"it cannot be unpacked ({error})") from error
            try:
                yield text.decode("utf-8")
            except UnicodeDecodeError as error:
                line = text.count(b"\n", 0, error.start) + 1
                raise BadDocument(path, f"line {line}", "this is not UTF-8 text") from error


@dataclass(frozen=True)
class LinesBetween:
    """The lines of a JSONL file that begin between two bytes."""

    path: Path
    pick: Pick
    start: int
    stop: int

    @property
    def source_bytes(self) -> int:
        """Bytes of the file that this is."""
        return self.stop - self.start

    def documents(self) -> Iterable[Document]:
        """Read the lines. Raises BadDocument for one that cannot be used."""
        with self.path.open("rb") as file:
            if self.start:
                file.seek(self.start - 1)
                file.readline()  # the line that the block before ends with
            while (at := file.tell()) < self.stop and (line := file.readline()):
                try:
                    record = parse_line(line)
                    document = None if record is None else self.pick(record)
                except ValueError as error:
                    file.seek(0)
                    raise BadDocument(self.path, f"line {_count_lines(file, at) + 1}", str(error)) from error
                if document is not None:
                    yield document


@dataclass(frozen=True)
class Lines:
    """Lines of a compressed JSONL file, unpacked."""

    path: Path
    pick: Pick
    first_line: int
    data: bytes
    source_bytes: int

    def documents(self) -> Iterable[Document]:
        """Parse the lines. Raises BadDocument for one that cannot be used."""
        for number, line in enumerate(io.BytesIO(self.data), self.first_line):
            try:
                record = parse_line(line)
                document = None if record is None else self.pick(record)
            except ValueError as error:
                raise BadDocument(self.path, f"line {number}", str(error)) from error
            if document is not None:
                yield document


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the object of a JSON line; None for a blank line.

    Raises ValueError, which says what is wrong.
    """
    if line.isspace():
        return None
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError("this is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        at = min(error.pos, len(error.doc.rstrip())) + 1  # the end of the line rather than the line after
        raise ValueError(f"this is not JSON ({error.msg}, at character {at})") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets without end
        raise ValueError(f"this is not JSON that can be read ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"this is a JSON {type(record).__name__}, not an object with keys")
    return record


def _missing_key(key: str, keys: list[str]) -> str:
    there = ", ".join(f"'{name}'" for name in keys) or "none at all"
    return f"there is no key '{key}'{nearest(key, keys)} (keys: {there})"


def _text(value: Any, key: str) -> Document:
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"'{key}' is {json.dumps(value, default=str)[:40]}, not a text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"'{key}' holds half of a surrogate pair, which is no character") from error
    return value


def _count_lines(file: BinaryIO, stop: int) -> int:
    count = 0
    while stop > 0 and (data := file.read(min(stop, 1 << 20))):
        count += data.count(b"\n")
        stop -= len(data)
    return count


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path)  # pyright: ignore[reportReturnType]
    return io.BufferedReader(_Zstd(path.open("rb"))) if path.suffix == ".zst" else path.open("rb")


def _compressed_blocks(file: InputFile, pick: Pick) -> Iterator[Block]:
    with file.path.open("rb") as raw, _unpacked(raw, file.path) as lines:
        line, read, rest = 1, 0, b""
        try:
            while data := lines.read(BLOCK_BYTES):
                end = data.rfind(b"\n") + 1
                data, rest = (rest + data[:end], data[end:]) if end else (b"", rest + data)
                if data:
                    yield Lines(file.path, pick, line, data, raw.tell() - read)
                    line, read = line + data.count(b"\n"), raw.tell()
        except (OSError, EOFError, zlib.error, *_zstd_errors()) as error:
            raise BadDocument(file.path, f"after line {line - 1}", f"it cannot be unpacked ({error})") from error
        if rest:
            yield Lines(file.path, pick, line, rest, raw.tell() - read)


def _unpacked(raw: BinaryIO, path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(_Zstd(raw))


class _Begin:
    """What stands for the frame before the first one."""

    eof, unused_data = True, b""


class _Zstd(io.RawIOBase):
    """Reads zstd frames, one after the other; raises EOFError where the last one is cut off, which the library's own
    reader takes for the end."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._made = raw, memoryview(b"")
        self._frame: Any = _Begin()

    def readable(self) -> bool:
        """Yes."""
        return True

    def close(self) -> None:
        """Close the packed file, too."""
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what comes next; returns how many bytes of it, 0 at the end."""
        while not self._made:
            ended = self._frame.eof
            data = (self._frame.unused_data if ended else b"") or self._raw.read(1 << 17)
            if not data and not ended:
                raise EOFError("the file is cut off")
            if not data:
                return 0
            if ended:
                self._frame = _library("zstandard").ZstdDecompressor().decompressobj()
            self._made = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._made))
        buffer[:count] = self._made[:count]
        self._made = self._made[count:]
        return count


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


def _parquet_blocks(file: InputFile, pick: Pick) -> Iterator[Block]:
    parquet = _library("pyarrow.parquet")
    columns = [pick.key] if isinstance(pick, Text) else None
    try:
        with parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if columns and columns[0] not in names:
                raise BadDocument(file.path, "schema", _missing_key(columns[0], names))
            rows = max(1, table.metadata.num_rows)
            at = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                texts = []
                for row, record in enumerate(batch.to_pylist(), at):
                    try:
                        texts.append(pick(record))
                    except ValueError as error:
                        raise BadDocument(file.path, f"row {row}", str(error)) from error
                yield Texts(texts, file.size * (at + len(batch)) // rows - file.size * at // rows)
                at += len(batch)
    except (_library("pyarrow").ArrowException, OSError) as error:
        raise BadDocument(file.path, "whole file", f"it cannot be read as Parquet ({error})") from error


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(
            f"reading such a file needs the package {package}: `uv sync --inexact --extra data` in the project's "
            "folder brings it"
        ) from error
