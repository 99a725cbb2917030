import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.data import inputs
from hybrid.errors import ConfigError

DOCUMENTS = ["one", "größer 漢字\n", ["two", "sentences"], "", "x" * 300, "last"]


def lines(documents, end="\n") -> bytes:
    return "".join(json.dumps({"id": 1, "text": document}) + end for document in documents).encode()


def read(*paths: Path, key: str = "text"):
    files = inputs.find_inputs([str(path) for path in paths])
    return [document for block in inputs.read_blocks(files, inputs.Text(key)) for document in block.documents()]


def compress(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else zstandard.compress(data))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson.gz"])
@pytest.mark.parametrize("block_bytes", [1, 10, 64, 1 << 20])
def test_json_lines_in_all_wrappings_are_the_same_documents(tmp_path, monkeypatch, name, block_bytes):
    monkeypatch.setattr(inputs, "BLOCK_BYTES", block_bytes)
    path, data = tmp_path / name, lines(DOCUMENTS)
    compress(path, data) if path.suffix in (".gz", ".zst") else path.write_bytes(data)
    assert read(path) == DOCUMENTS
    blocks = list(inputs.read_blocks(inputs.find_inputs([str(path)]), inputs.Text("text")))
    assert sum(block.source_bytes for block in blocks) == path.stat().st_size


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    last_line_ends=st.booleans(),
    block_bytes=st.integers(1, 50),
)
def test_blocks_lose_no_line_wherever_they_are_cut(tmp_path_factory, documents, end, last_line_ends, block_bytes):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    data = lines(documents, end) or b"\n"
    path.write_bytes(data if last_line_ends else data.rstrip(b"\r\n") or b"\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "BLOCK_BYTES", block_bytes)
        assert read(path) == documents
        gz = compress(path.with_suffix(".jsonl.gz"), path.read_bytes())
        assert read(gz) == documents


def test_a_parquet_column_is_documents(tmp_path):
    table = pyarrow.table({"id": list(range(6)), "body": [d if isinstance(d, str) else "" for d in DOCUMENTS]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet", key="body") == [d if isinstance(d, str) else "" for d in DOCUMENTS]


def test_a_text_file_is_one_document_and_a_folder_all_in_it(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "z.txt").write_text("first\nsecond")
    (tmp_path / "b" / "c" / "x.py").write_text("code")
    (tmp_path / "b" / ".hidden").write_text("no")
    compress(tmp_path / "b" / "d.txt.gz", b"packed")
    (tmp_path / "b" / "e.jsonl").write_bytes(lines(["line"]))
    (tmp_path / "a.md").write_text("alone")
    assert read(tmp_path / "b", tmp_path / "a.md") == ["code", "packed", "line", "first\nsecond", "alone"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_packed_file_that_is_cut_off_is_not_taken_for_a_whole_one(tmp_path, name):
    documents = [f"{number:60}" for number in range(5000)]  # in lines that may end where a block of the packer does
    path = compress(tmp_path / name, lines(documents) if "jsonl" in name else "".join(documents).encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(inputs.BadDocument, match=r"cannot be unpacked"):
        read(path)


def test_zstd_frames_follow_each_other_as_gzip_members_do(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(lines([document])) for document in DOCUMENTS))
    assert read(path) == DOCUMENTS


def test_what_a_preparation_writes_into_the_folder_is_not_read(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out.unfinished").mkdir()
    for name in ("out.unfinished/journal.json", "out.bin", "out.idx", "out.json", "outer.json"):
        (tmp_path / name).write_text("{}")
    found = inputs.find_inputs([str(tmp_path)], output=tmp_path / "out")
    assert [file.path.name for file in found] == ["a.txt", "outer.json"]


def test_what_is_no_text_in_a_folder_is_passed_over_and_counted(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("text")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\0")
    (folder / "nothing.txt").touch()
    left_out = Counter()
    assert [file.path.name for file in inputs.find_inputs([str(folder)], left_out=left_out)] == ["a.md"]
    assert left_out == {"not UTF-8 text": 1, "empty": 1}
    # What is named by itself is meant.
    found = inputs.find_inputs([str(folder / "picture.png")], left_out=left_out)
    assert [file.path.name for file in found] == ["picture.png"]
    with pytest.raises(ConfigError, match=r"nothing\.txt' is empty"):
        inputs.find_inputs([str(folder / "nothing.txt")], left_out=left_out)
    (folder / "a.md").unlink()
    with pytest.raises(ConfigError, match=r"holds no files that can be used \(1 file empty, 1 file not UTF-8 text\)"):
        inputs.find_inputs([str(folder)], left_out=Counter())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"this is not JSON \(Expecting ',' delimiter, at character 13\)"),
        (b"[" * 100_000, "this is not JSON that can be read"),
        (b'["text"]', "this is a JSON list, not an object with keys"),
        (b'{"texts": "a", "id": 1}', r"no key 'text'; did you mean texts\? \(keys: 'texts', 'id'\)"),
        (b'{"text": 3}', "'text' is 3, not a text"),
        (b'{"text": null}', "'text' is null, not a text"),
        (b'{"text": ["a", 3]}', r"not a text"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "\xff"}', "this is not UTF-8 text"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, monkeypatch, name, line, message):
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 32)
    data = lines(["good"] * 7) + b"\n" + line + b"\n" + lines(["good"])
    path = tmp_path / name
    compress(path, data) if name.endswith("gz") else path.write_bytes(data)
    with pytest.raises(inputs.BadDocument, match=rf"'.*{name}', line 9: .*{message}"):
        read(path)


def test_files_that_cannot_be_unpacked_are_named(tmp_path):
    data = lines([str(i) for i in range(10000)])
    whole = compress(tmp_path / "a.jsonl.gz", data).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jsonl.zst").write_bytes(b"not zstd")
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    (tmp_path / "d.txt").write_bytes(b"a\nb\xff")
    for name, message in {
        "a.jsonl.gz": "after line .*cannot be unpacked",
        "b.jsonl.zst": "after line 0: it cannot be unpacked",
        "c.parquet": "cannot be read as Parquet",
        "d.txt": "line 2: this is not UTF-8",
    }.items():
        with pytest.raises(inputs.BadDocument, match=f"{name}', .*{message}"):
            read(tmp_path / name)


def test_a_missing_parquet_column_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(inputs.BadDocument, match=r"no key 'text' \(keys: 'body'\)"):
        read(tmp_path / "a.parquet")


def test_all_inputs_that_cannot_be_used_are_said_at_once(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as error:
        inputs.find_inputs([str(tmp_path / name) for name in ("empty.jsonl", "folder", "missing")])
    assert [str(problem).split("' ")[-1] for problem in error.value.problems] == [
        "is empty",
        "holds no files",
        "cannot be read: no such file or directory",
    ]
