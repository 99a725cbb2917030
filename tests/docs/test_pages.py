"""What the pages name is there: files, other pages, and verbs with their options."""

import itertools
import re
import shlex
import subprocess
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


def left_behind() -> set[str]:
    """Files and folders that the pages' commands write into the folder where they are typed."""
    found: set[str] = set()
    for line in (line for page in PAGES for line in commands(page)):
        command, _, into = line.partition(" > ")
        words = shlex.split(re.split(r" [<|] ", command)[0])
        found |= {into} if into else set()
        found |= {after for word, after in itertools.pairwise(words) if word in ("--output", "-o")}
        found |= {words[3]} if words[1] == "convert" else set()
    return {name for name in found if re.fullmatch(r"[a-z0-9][\w./-]*", name)}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_what_the_commands_of_the_pages_leave_is_not_in_gits_way() -> None:
    names = [*sorted(left_behind()), "instructions/train.jsonl", "prompts.jsonl"]
    assert {"data/docs", "tiny-hf", "answers.jsonl", "curves.html"} <= set(names)
    written = [[name, f"{name}/file", f"{name}.bin"] for name in names]  # a file, a folder, a prefix
    asked = ["git", "check-ignore", *itertools.chain(*written)]
    ignored = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert [files[0] for files in written if not set(files) & set(ignored)] == []
