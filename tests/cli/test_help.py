"""Help by groups, and what a shell offers when a word is completed."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from cli import help as helping
from cli import main

COMMANDS = typer.main.get_command(main.app).commands  # pyright: ignore[reportAttributeAccessIssue]
EXAMPLES = {name: example for group in helping.GROUPS.values() for name, example in group.items()}


def test_every_verb_has_a_group_and_an_example() -> None:
    assert set(EXAMPLES) == set(COMMANDS)
    assert all(EXAMPLES[name].startswith(f"hybrid {name}") for name in EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_is_one_that_its_verb_takes(name: str) -> None:
    words = shlex.split(EXAMPLES[name])[2:]
    command = COMMANDS[name]
    if name == "data":
        command = command.commands[words.pop(0)]
    command.make_context(name, words).close()  # reads the words, and runs nothing


def test_help_says_whole_sentences_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.run(["--help"])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.endswith(":") and line[0] != " "] == [
        "Options:",
        *(f"{heading}:" for heading in helping.GROUPS),
    ]
    assert "..." not in out.partition("Recipes:")[2]


def complete(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    asked = {"_HYBRID_COMPLETE": "complete_bash", "COMP_WORDS": shlex.join(words), "COMP_CWORD": str(len(words) - 1)}
    program = "import sys; sys.argv[0] = 'hybrid'; from cli.main import run; run()"
    environment = {**os.environ, **asked, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=folder, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["hybrid", "pret"], ["pretrain"]),
        (["hybrid", "show", "hybrid_"], ["hybrid_800m", "hybrid_8b"]),
        (["hybrid", "show", "shrink(hybrid_8"], ["shrink(hybrid_800m)", "shrink(hybrid_8b)"]),
        (["hybrid", "show", "tiny", "trainer.max_"], ["trainer.max_steps=", "trainer.max_samples="]),
        (["hybrid", "pretrain", "tiny", "executor.par"], ["executor.partition=", "executor.parallel_jobs="]),
        (["hybrid", "pretrain", "tiny", "--executor", "s"], ["slurm"]),
        (["hybrid", "status", "m"], ["mine"]),
        (["hybrid", "generate", "w"], ["weights/"]),
    ],
)
def test_what_a_shell_offers(tmp_path: Path, words: list[str], offered: list[str]) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "job.json").write_text("{}")
    (tmp_path / "weights").mkdir()
    assert complete(tmp_path, *words) == offered


def test_values_are_offered_where_they_can_be_counted() -> None:
    from recipes import completing

    assert [value for value, _ in completing.overrides("model.activation=g")] == ["model.activation=gelu"]
    assert [value for value, _ in completing.overrides("data=")] == ["data=stdlib", "data=mock"]
    assert [value for value, _ in completing.overrides("parallel.sequence=")] == [
        "parallel.sequence=True",
        "parallel.sequence=False",
    ]
    assert completing.overrides("model.hidden_size=") == []
