"""Many prompts from a file of JSON lines: what is read, what is refused, what is written."""

import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.data.tokenizer import ByteTokenizer
from hybrid.errors import ConfigError, UserError
from hybrid.generation import batches
from hybrid.generation.generator import Generator
from hybrid.generation.sampling import Sampling
from tests.hybrid.generation.conftest import Toy

OWN = {"max_tokens": 6, "temperature": 0.5}


@pytest.fixture
def model(hybrid_model: Toy) -> Iterator[Generator]:
    with Generator(hybrid_model.runner(slots=4), ByteTokenizer(), "toy") as generator:
        yield generator


def read(folder: Path, *lines: Any) -> list[batches.Request]:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return batches.read(path, OWN)


def refused(folder: Path, *lines: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read(folder, *lines)
    return [str(problem).replace(f"{folder}/", "") for problem in error.value.problems]


def test_a_line_has_a_prompt_and_settings_of_its_own(tmp_path: Path) -> None:
    lines = [{"prompt": "def "}, "", {"prompt": [1, 2], "seed": 3, "temperature": 1, "stop": ["\n", "x"], "echo": True}]
    assert read(tmp_path, *lines) == [
        batches.Request(f"{tmp_path}/prompts.jsonl:1", "def ", Sampling(max_tokens=6, temperature=0.5)),
        batches.Request(
            f"{tmp_path}/prompts.jsonl:3",
            [1, 2],
            Sampling(max_tokens=6, temperature=1, seed=3, stop=("\n", "x"), echo=True),
        ),
    ]


def test_lines_come_from_stdin_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "a"}\n'))
    assert batches.read(Path("-"), OWN) == [batches.Request("-:1", "a", Sampling(**OWN))]


def test_everything_wrong_is_said_at_once_with_its_line(tmp_path: Path) -> None:
    names = "echo, ignore_end, logprobs"
    said = refused(
        tmp_path,
        "{",
        "[1]",
        {"prompt": ""},
        {"prompt": "a", "top_q": 1, "seed": "x", "echo": 1, "stop": 7, "max_tokens": True},
        {"prompt": [True]},
        {"prompt": "a", "top_p": 7},
        '{"prompt": "\\udc80"}',
    )
    assert said[0].startswith("prompts.jsonl:1: is no JSON: Expecting property name")
    assert said[1] == 'prompts.jsonl:2: is no object such as {"prompt": "def "}'
    assert said[2] == "prompts.jsonl:3 prompt: must be a text or a list of tokens, and not empty"
    assert said[3].startswith(f"prompts.jsonl:4 top_q: is no setting; there are {names}")
    assert said[4:8] == [
        "prompts.jsonl:4 max_tokens: is True; it must be a whole number",
        "prompts.jsonl:4 seed: is 'x'; it must be a whole number or None",
        "prompts.jsonl:4 stop: is 7; it must be a text or a list of texts",
        "prompts.jsonl:4 echo: is 1; it must be true or false",
    ]
    assert said[8] == "prompts.jsonl:5 prompt: must be a text or a list of tokens, and not empty"
    assert said[9].startswith("prompts.jsonl:6 top_p: ")
    assert said[10] == "prompts.jsonl:7 prompt: holds half of a character, which is no text in UTF-8"


def test_a_file_without_lines_or_that_is_none_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, "", "  ") == ["--batch: 'prompts.jsonl' has no lines"]
    (tmp_path / "bytes").write_bytes(b"\xff")
    for path in (tmp_path / "bytes", tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=r"--batch: '.*' cannot be read: "):
            batches.read(path, OWN)
    for output, says in ((tmp_path / "none" / "x", "is in a folder that does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(ConfigError, match=f"--output: '.*' {says}"):
            batches.refuse_output(output)


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "a\u2028b\u0085c"}\r\n{"prompt": "d"}\n'.encode())
    assert [request.prompt for request in batches.read(path, OWN)] == ["a\u2028b\u0085c", "d"]


def test_an_output_replaces_nothing_and_follows_a_link(tmp_path: Path, model: Generator) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to the fifo").symlink_to("fifo")
    for output in (Path("/dev/null"), tmp_path / "fifo", tmp_path / "to the fifo"):
        with pytest.raises(ConfigError, match=r"--output: '.*' is no regular file"):
            batches.refuse_output(output)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "texts.jsonl").touch()
    (tmp_path / "texts.jsonl").write_text("from an hour's work")
    with pytest.raises(ConfigError, match=r"--output: '.*texts.jsonl' is there already; remove it, or name another"):
        batches.refuse_output(tmp_path / "texts.jsonl")
    link = tmp_path / "link"
    link.symlink_to("elsewhere/texts.jsonl")
    batches.refuse_output(link)
    batches.run(model, read(tmp_path, {"prompt": "a"}), link)
    assert link.is_symlink()
    assert json.loads((tmp_path / "elsewhere" / "texts.jsonl").read_text())["prompt"] == "a"


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists) | st.text())
def test_any_value_is_a_setting_or_is_refused(value: Any) -> None:
    for line in (json.dumps({"prompt": value, "seed": value, "stop": value, "temperature": value}), str(value)):
        try:
            batches._request(line, OWN)
        except ConfigError as error:
            assert error.problems


def test_nesting_without_end_is_no_json(tmp_path: Path) -> None:
    assert refused(tmp_path, "[" * 100_000)[0].startswith("prompts.jsonl:1: is no JSON: ")


def test_a_line_for_each_request_in_their_order(tmp_path: Path, model: Generator) -> None:
    requests = read(
        tmp_path,
        *({"prompt": "ab"[: 1 + i % 2], "max_tokens": 20 - i, "seed": i, "ignore_end": True} for i in range(9)),
        {"prompt": "a", "logprobs": 2, "seed": 1, "ignore_end": True},
    )
    reports: list[str] = []
    batches.run(model, requests, tmp_path / "texts.jsonl", reports.append)
    results = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    alone = [model.generate(request.prompt, **vars(request.sampling)).text for request in requests]
    assert [result["text"] for result in results] == alone
    assert {result["finish_reason"] for result in results} == {"length"}
    assert len(results[-1]["tokens"]) == 6 and len(results[-1]["tokens"][0]["top"]) == 2
    assert len(reports) == 10 and reports[-1].startswith("10 of 10, ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "texts.jsonl"]


def test_without_an_output_the_lines_go_to_stdout(
    tmp_path: Path, model: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    batches.run(model, read(tmp_path, {"prompt": "a"}), None)
    assert json.loads(capsys.readouterr().out)["prompt"] == "a"


def test_what_the_model_cannot_do_is_said_before_anything_is_written(tmp_path: Path, model: Generator) -> None:
    requests = read(tmp_path, {"prompt": "a"}, {"prompt": [9999]}, "", {"prompt": "a", "max_tokens": 10**6})
    with pytest.raises(ConfigError) as error:
        batches.run(model, requests, tmp_path / "texts.jsonl")
    assert [problem.place for problem in error.value.problems] == [
        f"{tmp_path}/prompts.jsonl:{line}" for line in ("2 prompt", "4 max_tokens")
    ]
    assert not (tmp_path / "texts.jsonl").exists()


def test_an_output_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, model: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    requests = read(tmp_path, {"prompt": "a"})
    monkeypatch.setattr(batches.os, "replace", full)
    with pytest.raises(UserError, match=r"texts.jsonl was not written: No space left on device"):
        batches.run(model, requests, tmp_path / "texts.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]
