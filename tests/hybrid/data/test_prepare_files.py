"""`prepare_files`: the bytes of Megatron's tool, and what happens when it is stopped, killed or out of room."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybrid.data import inputs, prepare_files, tokenizer_files
from hybrid.data.tokenizer import ByteTokenizer, load_tokenizer
from hybrid.errors import ConfigError, UserError

DOCUMENTS = [
    "It's a text.",
    "",
    ["one. ", "", "two"],
    [],
    ["", ""],
    "größer 漢字 😀 <s>",
    "  spaces  ",
    "\r\n\t",
    "x" * 999,
]


def write_lines(path: Path, documents: list) -> str:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


def prepare(source: str, output: Path, tokenizer=None, **options) -> prepare_files.Prepared:
    tokenizer = tokenizer or ByteTokenizer()
    return prepare_files.prepare_files([source], tokenizer=tokenizer, output=str(output), quiet=True, **options)


def read(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def prepare_as_upstream(source: str, prefix: Path, tokenizer) -> None:
    """The loop of Megatron-LM's tools/preprocess_data.py (Encoder.encode and Partition.process_json_file)."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    with open(source, encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            document, lengths = [], []
            for sentence in text if isinstance(text, list) else [text]:
                ids = tokenizer.tokenize(sentence)
                if len(ids) > 0:
                    document.extend(ids)
                    lengths.append(len(ids))
            if len(document) > 0:
                document.append(tokenizer.eod)
                lengths[-1] += 1
            builder.add_document(document, lengths)  # pyright: ignore[reportArgumentType]
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("huggingface", "huggingface"),
        ("with_bos", "huggingface"),
        ("bpe.model", "sentencepiece"),
        ("unigram.model", "sentencepiece"),
    ],
)
def test_files_are_those_of_megatrons_tool(tmp_path, monkeypatch, tokenizer_folder, name, library, workers):
    from megatron.core.tokenizers import MegatronTokenizer

    monkeypatch.setattr(inputs, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(tokenizer_files, "_MANY_CHARACTERS", 0)  # by words, where that is known, as in large files
    path = str(tokenizer_folder / name)
    source = write_lines(tmp_path / "x.jsonl", DOCUMENTS * 20)
    theirs = MegatronTokenizer.from_pretrained(path, {"library": library})  # pyright: ignore
    prepare_as_upstream(source, tmp_path / "theirs", theirs)
    prepared = prepare(source, tmp_path / "ours", load_tokenizer(path), workers=workers)
    assert read(tmp_path / "ours") == read(tmp_path / "theirs")
    assert prepared.documents == len(DOCUMENTS) * 20
    assert sorted(path.name for path in tmp_path.glob("ours*")) == ["ours.bin", "ours.idx", "ours.json"]


def test_what_was_prepared_is_not_done_again_and_not_overwritten(tmp_path):
    source = write_lines(tmp_path / "x.jsonl", DOCUMENTS)
    first = prepare(source, tmp_path / "out")
    again = prepare(source, tmp_path / "out")
    assert again.reused and (again.tokens, again.documents) == (first.tokens, first.documents)
    write_lines(tmp_path / "x.jsonl", ["other"])
    with pytest.raises(ConfigError, match=r"^--output: '.*out\.idx' is there already, from other inputs"):
        prepare(source, tmp_path / "out")


def test_inputs_without_text_are_refused(tmp_path):
    source = write_lines(tmp_path / "x.jsonl", ["", []])
    with pytest.raises(ConfigError, match="there is no text in the inputs"):
        prepare(source, tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


def test_a_bad_line_leaves_nothing_behind(tmp_path):
    source = write_lines(tmp_path / "x.jsonl", [*DOCUMENTS, 3])
    for workers in (1, 2):
        with pytest.raises(inputs.BadDocument, match=r"x\.jsonl', line 10: 'text' is 3, not a text"):
            prepare(source, tmp_path / "out", workers=workers)
    assert list(tmp_path.glob("out*")) == []


def test_a_full_disk_is_said_and_gone_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 500)
    source = write_lines(tmp_path / "x.jsonl", DOCUMENTS * 9)
    count = prepare_files._count

    def full(journal, *args):
        if journal.blocks == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        count(journal, *args)

    monkeypatch.setattr(prepare_files, "_JOURNAL_SECONDS", 0)
    monkeypatch.setattr(prepare_files, "_count", full)
    with pytest.raises(UserError, match=r"cannot write to '.*': no space left on device; make room or choose another"):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out.bin").exists()
    monkeypatch.setattr(prepare_files, "_count", count)
    prepared = prepare(source, tmp_path / "out")
    assert 0 < prepared.encoded_tokens < prepared.tokens
    prepare(source, tmp_path / "whole")
    assert read(tmp_path / "out") == read(tmp_path / "whole")


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_run_stopped_while_it_moved_its_files_goes_on(tmp_path, monkeypatch, moved):
    source = write_lines(tmp_path / "x.jsonl", DOCUMENTS)
    rename = Path.rename
    done = []

    def stop(self, target):
        if str(target).endswith((".bin", ".idx")):
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(target)
        return rename(self, target)

    if moved < 2:
        monkeypatch.setattr(Path, "rename", stop)
    else:
        monkeypatch.setattr(prepare_files.shutil, "rmtree", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out")
    monkeypatch.undo()
    prepare(source, tmp_path / "out")
    prepare(source, tmp_path / "whole")
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    assert not (tmp_path / "out.unfinished").exists()


def test_unfinished_work_on_other_inputs_is_not_gone_on_with(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "x.jsonl", DOCUMENTS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_files, "_write_index", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(source, tmp_path / "out")
    write_lines(tmp_path / "x.jsonl", ["other"])
    assert prepare(source, tmp_path / "out").tokens == len("other") + 1


def test_two_at_once_on_one_output_are_refused(tmp_path):
    source = write_lines(tmp_path / "x.jsonl", DOCUMENTS)
    (tmp_path / "out.unfinished").mkdir()
    with (
        prepare_files._only_process(tmp_path / "out.unfinished"),
        pytest.raises(UserError, match="another process is writing to"),
    ):
        prepare(source, tmp_path / "out")


SCRIPT = """
import sys, time
from hybrid.data import encode, inputs, prepare_files
from hybrid.data.tokenizer import ByteTokenizer
inputs.BLOCK_BYTES = 2000
prepare_files._JOURNAL_SECONDS = 0
encode_documents = encode.encode_documents
def slow(*args):
    time.sleep(float(sys.argv[3]))
    return encode_documents(*args)
encode.encode_documents = slow
prepare_files.prepare_files([sys.argv[1]], tokenizer=ByteTokenizer(), output=sys.argv[2], workers=2, quiet=True)
"""


def start(source: str, output: Path, pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, source, str(output), str(pause)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_journal(output: Path) -> None:
    deadline = time.monotonic() + 20
    while not Path(f"{output}.unfinished/journal.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_and_its_workers_end(tmp_path, end, monkeypatch):
    source = write_lines(tmp_path / "x.jsonl", DOCUMENTS * 50)
    process = start(source, tmp_path / "out", 0.1)
    wait_for_journal(tmp_path / "out")
    workers = children(process.pid)
    assert len(workers) == 2
    os.killpg(process.pid, end) if end == signal.SIGINT else process.send_signal(end)
    process.wait(10)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers)
    if end == signal.SIGINT:
        assert process.stderr and "the same command goes on from here" in process.stderr.read()
    assert not (tmp_path / "out.bin").exists()
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 2000)
    prepared = prepare(source, tmp_path / "out")
    assert 0 < prepared.encoded_tokens < prepared.tokens
    prepare(source, tmp_path / "whole")
    assert read(tmp_path / "out") == read(tmp_path / "whole")


def test_a_worker_that_is_killed_is_said(tmp_path):
    source = write_lines(tmp_path / "x.jsonl", DOCUMENTS * 50)
    process = start(source, tmp_path / "out", 0.2)
    wait_for_journal(tmp_path / "out")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    assert (
        process.communicate(timeout=10)[1]
        .splitlines()[-1]
        .endswith("a worker process was killed, as happens when memory runs out: use fewer workers")
    )
