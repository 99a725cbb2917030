import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hybrid.config import DataConfig
from hybrid.data import cache, corpus, prepare
from hybrid.data.indexed import IndexedWriter
from hybrid.data.tokenizer import ByteTokenizer
from hybrid.errors import ConfigError, UserError

TEXTS = {"a.txt": "first file\n" * 9, "b.txt": "zweite Datei, größer\n" * 50, "c.txt": "third\n"}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return DataConfig(source="text", path=str(folder), split=[80, 20, 0], cache=str(tmp_path / "cache"))


def prepared(data):
    return prepare.prepare_corpus(data, ByteTokenizer(), quiet=True)


def folders(data):
    return sorted(path.name for path in (cache.cache_folder(data) / "corpora").iterdir())


def test_the_files_hold_every_text_and_its_end(data):
    made = prepared(data)
    documents = []
    for split in ("train", "validation"):
        tokens = np.fromfile(f"{made.prefix(split)}.bin", np.uint16)
        assert len(tokens) == made.parts[split].tokens
        ends = np.flatnonzero(tokens == 256)
        documents += [ByteTokenizer().decode(part) for part in np.split(tokens, ends + 1)[:-1]]
    assert sorted(documents) == sorted(TEXTS.values())
    assert sum(part.bytes for part in made.parts.values()) == sum(len(text.encode()) for text in TEXTS.values())
    assert made.prefix("test") is None


def test_a_prepared_corpus_is_reused_until_something_changes(data, capsys):
    first = prepared(data)
    assert not first.reused and prepared(data).reused
    Path(data.path, "c.txt").write_text("changed\n")
    assert not prepared(data).reused
    data.split = [60, 40, 0]
    assert not prepare.prepare_corpus(data, ByteTokenizer()).reused
    prepare.prepare_corpus(data, ByteTokenizer())
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["data prepared", "data reused"]


def test_damaged_files_in_the_cache_are_made_again(data):
    made = prepared(data)
    with open(f"{made.prefix('train')}.bin", "r+b") as file:
        file.truncate(10)
    again = prepared(data)
    assert not again.reused and again.sha256 == made.sha256


def test_a_full_disk_leaves_nothing_behind(data, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "add", full)
    with pytest.raises(UserError, match=r"cannot write to '.*': no space left on device; .*data\.cache"):
        prepared(data)
    assert folders(data) == []


def test_a_cache_that_cannot_be_a_folder_is_said(data, tmp_path):
    (tmp_path / "file").touch()
    data.cache = str(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"cannot write to .*not a directory.*data\.cache"):
        prepared(data)


def test_text_that_turns_out_to_be_none_is_counted(data, monkeypatch):
    monkeypatch.setattr(corpus, "SNIFF_BYTES", 4)
    Path(data.path, "d.txt").write_bytes(b"abcde\xff")
    assert prepared(data).skipped == {"not UTF-8 text": 1}


def test_a_split_without_readable_text_is_refused(data, monkeypatch):
    monkeypatch.setattr(corpus, "SNIFF_BYTES", 4)
    for name in TEXTS:
        Path(data.path, name).write_bytes(b"abcde\xff")
    with pytest.raises(ConfigError, match="all text for train is unreadable"):
        prepared(data)
    assert folders(data) == []


SCRIPT = """
import sys, time
from hybrid.config import DataConfig
from hybrid.data import prepare
from hybrid.data.tokenizer import ByteTokenizer
data = DataConfig(source="text", path=sys.argv[1], split=[80, 20, 0], cache=sys.argv[2])
blocks = prepare._blocks
def slow(*args):
    print("reading", flush=True)
    time.sleep(float(sys.argv[3]))
    return blocks(*args)
prepare._blocks = slow
print(prepare.prepare_corpus(data, ByteTokenizer(), quiet=True).sha256)
"""


def start(data, pause):
    command = [sys.executable, "-c", SCRIPT, data.path, data.cache, str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_preparation_is_not_taken_for_a_finished_one(data):
    process = start(data, 60)
    assert process.stdout and process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(folders(data)) == 1 and folders(data)[0].endswith(".unfinished")
    assert not prepared(data).reused
    litter = cache.cache_folder(data) / "corpora" / folders(data)[1]
    os.utime(litter, (0, 0))
    cache.remove_litter(litter.parent)
    assert len(folders(data)) == 1


def test_two_processes_at_once_agree(data):
    processes = [start(data, 0.1) for _ in range(2)]
    outputs = [process.communicate()[0].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [prepared(data).sha256] * 2
    assert len(folders(data)) == 1
