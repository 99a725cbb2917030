"""The code of docs/recipes.md, run from top to bottom: Python in one session, commands in a folder with its files."""

import re
import shlex
from pathlib import Path

import pytest

from cli import main

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
BLOCKS = re.findall(r"```(python|console)\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for kind, text in BLOCKS:
        if file := re.match(r"# (\w+\.py)\n", text):
            (tmp_path / file[1]).write_text(text)
        elif kind == "python":
            exec(text, session)
        for line in text.splitlines() if kind == "console" else ():
            assert line.startswith("$ hybrid ")
            with pytest.raises(SystemExit) as end:
                main.run(shlex.split(line)[2:])
            out, err = capsys.readouterr()
            assert (end.value.code or 0, err) == (0, ""), line
            assert out


def test_the_page_has_code() -> None:
    assert len(BLOCKS) > 8
