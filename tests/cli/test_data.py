"""`hybrid data prepare`: what it prints, and its exit codes."""

import json
from pathlib import Path

import pytest

from cli.main import run


def hybrid(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        run(["data", "prepare", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture
def lines(tmp_path) -> str:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"body": "some text"}\n{"body": "more"}\n')
    return str(path)


def test_prepare_says_what_it_wrote(tmp_path, lines, capsys):
    output = str(tmp_path / "out")
    arguments = [lines, "--tokenizer", "byte", "--key", "body", "--output", output, "--workers", "1"]
    assert hybrid(*arguments) == 0
    assert capsys.readouterr().out.startswith(f"{output}: 2 documents, 15 tokens, 0.00 MB of text in ")
    assert Path(f"{output}.bin").stat().st_size == 2 * 15
    assert hybrid(*arguments, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["documents"], facts["tokens"], facts["text_bytes"], facts["reused"]) == (2, 15, 13, True)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"--tokenizer": "bytes"}, 2, "--tokenizer: there is no tokenizer 'bytes'"),
        ({"--key": "text"}, 2, "lines.jsonl', line 1: there is no key 'text' (keys: 'body')"),
        ({"--output": "lines.jsonl/out"}, 2, "cannot write to"),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr(tmp_path, lines, capsys, monkeypatch, change, code, message):
    monkeypatch.chdir(tmp_path)
    options = {"--tokenizer": "byte", "--key": "body", "--output": "out", "--workers": "1"} | change
    assert hybrid(lines, *(word for option in options.items() for word in option)) == code
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""


def test_inputs_that_are_not_there_are_all_named(tmp_path, capsys):
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.txt")]
    assert hybrid(*names, "--tokenizer", "byte", "--output", str(tmp_path / "out")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [name in line for name, line in zip(names, errors, strict=True)] == [True, True]
