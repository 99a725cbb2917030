"""What the pages name is there: files, other pages, and verbs with their options."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cli import main
from hybrid.checks import check
from hybrid.costs.plan import smallest_world
from recipes import launching
from recipes.settle import settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
VERBS = typer.main.get_command(main.app).commands  # pyright: ignore[reportAttributeAccessIssue]


def commands(page: Path) -> Iterator[str]:
    """The lines of a page's blocks that call `hybrid`, whole where they go on in the next."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    for line in text.splitlines():
        found = re.match(r"(?:    |\$ )?(?:pip install uv && )?(?:uv run )?(hybrid [a-z].*)", line)
        if found and not re.match(r"hybrid\S* (is|are|has) ", found[1]):
            yield found[1].split("  #")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_are_there(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]
    files = re.findall(r"`((?:cli|recipes|converters|hybrid|tests|benchmarks|docs)/[\w/]+\.(?:py|md))`", text)
    assert not [file for file in files if not (ROOT / file).exists()]


@pytest.mark.parametrize(
    "line", sorted({line for page in PAGES if page.name != "reference.md" for line in commands(page)})
)
def test_commands_have_the_verbs_and_options_there_are(line: str) -> None:
    name, *words = shlex.split(re.split(r" [<>|] ", line)[0])[1:]
    command = VERBS[name]
    if inner := getattr(command, "commands", None):
        command = inner[words.pop(0)]
    command.make_context(name, words).close()  # reads the words, and runs nothing


def test_the_python_of_the_readme_can_really_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --dry-run, which asks for less: also the tokenizer is there."""
    started: list[Any] = []
    monkeypatch.setattr("recipes.launch", lambda recipe, where: started.append((recipe, where)))
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGES[0].read_text(), re.MULTILINE | re.DOTALL)
    exec(block, {})
    ((recipe, where),) = started
    built = settings(recipe)
    assert not check(built, where.processes(smallest_world(built)))
    assert not launching.absent(built, where, dry_run=False)
