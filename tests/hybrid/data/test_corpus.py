from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.config import DataConfig
from hybrid.data.corpus import SPLITS, Piece, SourceFile, find_files, split_files
from hybrid.errors import ConfigError


def text_folder(folder: Path) -> DataConfig:
    return DataConfig(source="text", path=str(folder))


def source(name: str, size: int = 100) -> SourceFile:
    return SourceFile(name, Path(name), size, 0)


def test_the_standard_library_is_a_corpus():
    files = find_files(DataConfig(source="stdlib"))
    names = [file.name for file in files.found]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    assert sum(file.size for file in files.found) > 5e6


def test_text_is_told_from_other_files_by_its_bytes(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "no_suffix").write_text("text")
    (tmp_path / "a.txt").write_text("é" * 5000)  # a character lies across the end of what is looked at
    (tmp_path / "cut.txt").write_bytes("é".encode()[:1])
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1") + b"a")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "empty").touch()
    (tmp_path / ".hidden").write_text("text")
    (tmp_path / "dangling").symlink_to("nowhere")
    files = find_files(text_folder(tmp_path))
    assert [file.name for file in files.found] == ["a.txt", "b/c/no_suffix"]
    assert files.skipped == Counter({"not UTF-8 text": 3, "empty": 1, "unreadable": 1})


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    (tmp_path / "a").write_text("text")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [file.name for file in find_files(text_folder(tmp_path)).found] == ["a"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no folder"),
        (lambda path: path.write_text("text"), "is a file: give the folder"),
        (lambda path: path.mkdir(), "there are no text files"),
        (lambda path: (path.mkdir(), (path / "x").touch()), r"there are no text files in .* \(1 file empty\)"),
    ],
)
def test_a_folder_without_text_is_one_clear_sentence(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(ConfigError, match=rf"^data\.path: .*{message}"):
        find_files(text_folder(tmp_path / "data"))


@given(
    st.lists(st.integers(1, 1000), min_size=3, max_size=40),
    st.tuples(st.integers(1, 100), st.integers(0, 100), st.integers(0, 100)),
)
def test_every_file_goes_to_one_split_and_no_share_stays_empty(sizes, shares):
    files = [source(f"file{i}", size) for i, size in enumerate(sizes)]
    split = split_files(files, list(shares))
    assert sorted(piece.file.name for name in SPLITS for piece in split[name]) == sorted(file.name for file in files)
    assert [bool(split[name]) for name in SPLITS] == [share > 0 for share in shares]
    for name, share in zip(SPLITS[1:], shares[1:], strict=True):
        if len(split[name]) > 1:  # a single file may be larger than the share
            assert sum(piece.file.size for piece in split[name]) <= share / sum(shares) * sum(sizes) * (1 + 1e-9)


def test_the_split_is_the_same_on_every_machine():
    files = [source(f"file{i}") for i in range(10)]
    held_out = [piece.file.name for piece in split_files(files[::-1], [80, 20, 0])["validation"]]
    assert held_out == ["file6", "file7"]


@given(st.text(alphabet="aé\n", min_size=3), st.floats(0.01, 0.98))
def test_a_single_file_is_cut_without_loss(text, share):
    split = split_files([source("only")], [share, 1 - share, 0])
    train, validation = (piece.cut(text.encode()) for name in SPLITS for piece in split[name])
    assert (train + validation).decode() == text
    train.decode()


def test_a_file_is_cut_at_the_end_of_a_line():
    text = b"first\nsecond\nthird\n"
    assert Piece(source("x"), 0.0, 0.4).cut(text) == b"first\nsecond\n"
    assert Piece(source("x"), 0.4, 1.0).cut(text) == b"third\n"


@pytest.mark.parametrize("split", [[1.0], [0, 1, 0], [1, -1, 0], [1, float("nan"), 0], []])
def test_impossible_shares_are_refused(split):
    with pytest.raises(ConfigError, match=r"^data\.split"):
        split_files([source("x")], split)
