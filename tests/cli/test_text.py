"""`hybrid generate`: where its prompt comes from, and what it refuses before it loads a model."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.main import run
from tests.recipes.test_generating import checkpoint

SHORT = ["--tokenizer", "byte", "--max-tokens", "4", "--max-length", "64", "--temperature", "0", "--ignore-end"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield str(checkpoint(tmp_path_factory.mktemp("models"), "hybrid"))


class Terminal(io.StringIO):
    """A stdin at which somebody sits."""

    def isatty(self) -> bool:
        return True


def generate(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        run(["generate", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_prompt_comes_from_an_argument_a_file_or_stdin(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "start.txt").write_text("def ")
    texts = []
    for arguments in (["--prompt", "def "], ["--prompt-file", str(tmp_path / "start.txt")], ["--prompt", "-"], []):
        monkeypatch.setattr("sys.stdin", io.StringIO("def "))
        assert generate(model, *arguments, *SHORT) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def ") and texts == texts[:1] * 4


def test_line_ends_of_a_prompt_are_kept_and_stdin_is_utf8(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "start.txt").write_bytes(b"a\r\nb\r")
    for arguments in (["--prompt-file", str(tmp_path / "start.txt")], []):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\r\nb\r")))
        assert generate(model, *arguments, *SHORT) == 0
        assert capsys.readouterr().out.startswith("a\r\nb\r")
    for arguments, place in (([], "--prompt"), (["--batch", "-"], "--batch")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
        assert generate(model, *arguments) == 2
        assert f"{place}: stdin cannot be read: 'utf-8' codec can't decode" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["nan", "inf"])
def test_a_size_of_bodies_is_a_number(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(["serve", "no model of this name", "--body-mib", size])
    assert end.value.code == 2
    assert f"--body-mib: is {size}; give a number of MiB" in capsys.readouterr().err


def test_a_batch_comes_out_as_lines(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = tmp_path / "prompts.jsonl"
    batch.write_text('{"prompt": "a"}\n{"prompt": "b", "max_tokens": 2}\n')
    assert generate(model, "--batch", str(batch), *SHORT) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["a", "b"]
    assert generate(model, "--batch", str(batch), "--output", str(tmp_path / "texts.jsonl"), *SHORT) == 0
    assert [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()] == lines


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--prompt: is missing: give a text, --prompt-file, --batch, or text on stdin"),
        (["--prompt", "a", "--batch", "b"], "--batch: is one source too many beside --prompt; give one of them"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt-file: is one source too many beside --prompt; give one of"),
        (["--prompt-file", "none.txt"], "--prompt-file: 'none.txt' cannot be read: "),
        (["--batch", "none.jsonl"], "--batch: 'none.jsonl' cannot be read: "),
        (["--prompt", "a", "--output", "b"], "--output: is for --batch; give that, too, or leave it out\n"),
        (["--prompt", "a", "--slots", "32"], "--slots: is for --batch; give that, too, or leave it out\n"),
        (["--prompt", ""], "prompt: is empty; give the text to go on from"),
        (["--prompt", "a", "--top-p", "2", "--temperature", "-1"], "temperature: "),
    ],
)
def test_what_makes_no_sense_is_said_before_a_model_is_looked_for(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal())
    assert generate("no model of this name", *arguments) == 2
    assert says in capsys.readouterr().err
