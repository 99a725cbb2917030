"""The rule between the rooms: imports point down, and what describes imports nothing heavy.

`tests/cli/test_imports.py` measures the second half from outside, in a process for each describing verb.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("hybrid", "converters", "recipes", "cli")  # each may import those before it, and itself
HEAVY = {"torch", "megatron", "nemo_run", "transformers", "numpy", "fastapi", "uvicorn", "safetensors"}
FILES = [path.relative_to(ROOT) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
# What describes: recipes, the command, and what lies in `hybrid` itself and its costs, but for what hushes torch.
DESCRIBES = [
    path
    for path in FILES
    if path.parts[0] in ("recipes", "cli") or path.parts[:-1] in (("hybrid",), ("hybrid", "costs"))
    if path != Path("hybrid/quiet.py")
]


def imports(path: Path, *, everywhere: bool) -> Iterator[str]:
    """The modules that a file imports: everywhere in it, or only when it is imported itself."""
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path} imports relatively"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def brings(path: Path) -> frozenset[str]:
    """The packages that come along when a file is imported, those that its own imports bring too."""
    found: set[str] = set()
    for name in imports(path, everywhere=False):
        found.add(name.partition(".")[0])
        file = Path(*name.split(".")).with_suffix(".py")
        if file in FILES:
            found |= brings(file)
    return frozenset(found)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path) -> None:
    above = ROOMS[ROOMS.index(path.parts[0]) + 1 :]
    assert not [name for name in imports(path, everywhere=True) if name.partition(".")[0] in above]


@pytest.mark.parametrize("path", DESCRIBES, ids=str)
def test_what_describes_brings_nothing_heavy(path: Path) -> None:
    assert not brings(path) & HEAVY
