"""Write docs/reference.md: every verb and every field, from the code itself. A test holds the page to it.

python docs/reference.py
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference.md"
sys.path.insert(0, str(ROOT))

import typer  # noqa: E402

from cli import help as helping  # noqa: E402
from cli import main as command  # noqa: E402
from hybrid.config import Settings  # noqa: E402
from hybrid.pattern import LAYER_KINDS  # noqa: E402
from recipes import nodes, registry, typed  # noqa: E402
from recipes.executors import KINDS  # noqa: E402


def page() -> str:
    """The whole page."""
    return "\n".join([*_verbs(), *_settings(), *_parts(), *_executors(), *_symbols()]) + "\n"


def _verbs() -> Iterator[str]:
    yield from ("# Reference", "")
    yield from ("Made from the code by `python docs/reference.py`.", "", "## Verbs", "")
    verbs = typer.main.get_command(command.app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for heading, examples in helping.GROUPS.items():
        yield from (f"### {heading}", "")
        for name, example in examples.items():
            inner = getattr(verbs[name], "commands", None)
            for words, verb in (
                {f"{name} {key}": one for key, one in inner.items()}.items() if inner else [(name, verbs[name])]
            ):
                yield from _verb(words, verb, example)


def _verb(name: str, verb: Any, example: str) -> Iterator[str]:
    context = typer.Context(verb, info_name=f"hybrid {name}")
    usage = " ".join(verb.get_usage(context).split()).removeprefix("Usage: ")
    yield from (f"#### {name}", "", " ".join((verb.help or "").split()), "", f"    {usage}", "")
    rows = [row for parameter in verb.params if (row := parameter.get_help_record(context))]
    if rows:
        yield from ("| | |", "|---|---|")
        for words, meaning in rows:
            if words != "--help":
                yield f"| `{_cell(words)}` | {_cell(meaning)} |"
        yield ""
    yield from (f"    {example}", "")


def _settings() -> Iterator[str]:
    yield from ("## Fields of a recipe", "")
    yield from ("Set on the command line as `section.field=value`, in Python as `recipe.section.field = value`.", "")
    plain = {name: field for name, field in nodes.schema(Settings).items() if not field.section}
    yield from _table(plain)
    for name, section in nodes.SECTIONS.items():
        yield from (f"### {name}", "", inspect.getdoc(section) or "", "", *_table(nodes.schema(section)))


def _parts() -> Iterator[str]:
    yield from ("### Parts by name", "", "`SECTION=NAME` takes a whole section, as in `data=mock`.", "")
    yield from ("| part | what |", "|---|---|")
    for section in nodes.SECTIONS:
        for name, function in registry.parts(section).items():
            yield f"| `{section}={name}` | {_first_line(function)} |"
    yield ""


def _executors() -> Iterator[str]:
    yield from ("## Fields of an executor", "", "Set as `executor.field=value`.", "")
    for name, kind in KINDS.items():
        yield from (f"### {name}", "", _first_line(kind), "", *_table(nodes.schema(kind)))


def _symbols() -> Iterator[str]:
    yield from ("## Symbols of a layer pattern", "", "| symbol | layer |", "|---|---|")
    for symbol, kind in LAYER_KINDS.items():
        yield f"| `{symbol}` | {kind} |"
    yield from ("| `\\|` | a pipeline segment ends |", "| `/` | a multi-token-prediction depth begins |")


def _table(fields: dict[str, nodes.Field]) -> Iterator[str]:
    yield from ("| field | takes | default | meaning |", "|---|---|---|---|")
    for name, field in fields.items():
        unit = f" [{field.unit}]" if field.unit and field.unit not in field.doc else ""
        takes = _cell(typed.describe(field.annotation))
        default = f"`{field.default}`" if isinstance(field.default, str | int | float | list | dict | None) else ""
        yield f"| `{name}` | {takes} | {default} | {_cell(field.doc)}{unit} |"
    yield ""


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
