"""Where a value of a recipe was set: a line of Python, an override, a line of a file, or nowhere.

Fiddle records the line of a call for all of its arguments; the argument's own line is looked up in the source.
"""

import ast
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes import nodes

if TYPE_CHECKING:
    import fiddle as fdl


def origin(node: "fdl.Buildable[Any]", name: str, via: str = "") -> str:
    """Say where the value of a field was set: 'recipes/seed.py:33', 'override model.hidden_size=64', 'default'.

    `via` is the override that put the whole section there, if one did (see `part_of`).
    """
    entry = nodes.last_set(node, name)
    if entry is None:
        return "default"
    place = entry.location
    if place.filename == nodes.COMMAND_LINE:
        return f"override {place.function_name}"
    if place.filename == nodes.SUPERSEDED:
        return f"superseded by {place.function_name}"
    line = _keyword_line(place.filename, place.line_number, name) or place.line_number
    return f"{_shown(place.filename)}:{line}{f' by override {via}' if via else ''}"


def part_of(recipe: "fdl.Partial[Any]", section: str) -> str:
    """The override that put a section in its place (`data=mock`), '' if none did."""
    entry = nodes.last_set(recipe, section)
    return str(entry.location.function_name) if entry and entry.location.filename == nodes.COMMAND_LINE else ""


def _shown(filename: str) -> str:
    """A path as short as it is still found: from this project, else from the current folder, else whole."""
    path = Path(filename)
    for base in (Path(__file__).parent.parent, Path.cwd()):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return filename


def _keyword_line(filename: str, line: int, name: str) -> int | None:
    """The line of the argument `name` of a call that starts on `line` of a Python file; None if there is none."""
    return _keyword_lines(filename).get((line, name))


@cache
def _keyword_lines(filename: str) -> dict[tuple[int, str], int]:
    try:
        tree = ast.parse(Path(filename).read_text())
    except (OSError, SyntaxError, ValueError):  # a notebook's cell, a file that has changed since
        return {}
    return {
        (call.lineno, keyword.arg): keyword.lineno
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg
    }
