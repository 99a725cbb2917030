"""Making and reading the fiddle configs that recipes consist of. Fiddle is imported when one is made, not before.

A recipe is `partial(pretrain, name=..., model=config(ModelConfig, ...), ...)`; its sections are the dataclasses of
`hybrid.config`, its top level has the fields of `Settings`. Every value that was set remembers where: fiddle's
argument history. What a command line or a file has set is recorded with the locations made here.
"""

import contextlib
import copy
import dataclasses
import typing
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from hybrid.config import Settings
from hybrid.errors import nearest

if TYPE_CHECKING:
    import fiddle as fdl
    from fiddle.history import HistoryEntry, Location

COMMAND_LINE = "command line"  # file name of the locations of overrides
DEFAULTS = "defaults"  # file name of the locations of defaults that had to be written out
SUPERSEDED = "superseded"  # file name of the locations of values that `settle` cleared


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a section, or one section of a recipe."""

    name: str
    annotation: Any
    doc: str
    unit: str
    default: Any  # dataclasses.MISSING where there is none

    @property
    def section(self) -> type | None:
        """The section's dataclass, None for a plain value."""
        return (
            self.annotation if isinstance(self.annotation, type) and dataclasses.is_dataclass(self.annotation) else None
        )


@cache
def schema(cls: type) -> dict[str, Field]:
    """The fields of a dataclass of settings by name, in order."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: Field(
            field.name,
            hints[field.name],
            field.metadata.get("doc", ""),
            field.metadata.get("unit", ""),
            field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default,
        )
        for field in dataclasses.fields(cls)
    }


SECTIONS: dict[str, type] = {name: field.section for name, field in schema(Settings).items() if field.section}


def config[T](cls: type[T], **values: Any) -> "fdl.Config[T]":
    """Return the fiddle config of a section with these values set."""
    import fiddle as fdl

    _hide_this_file()
    if dataclasses.is_dataclass(cls):
        _refuse_unknown(cls.__name__, values, schema(cls))
    node = fdl.Config(cls, **values)
    # Fiddle cannot read a default that a factory makes, so these are written out.
    with set_by(DEFAULTS, 0):
        for name, field in schema(cls).items() if dataclasses.is_dataclass(cls) else ():
            if isinstance(field.default, list | dict) and name not in values:
                setattr(node, name, copy.copy(field.default))
    return node


def partial(function: Callable[..., Any], **values: Any) -> "fdl.Partial[Any]":
    """Return the recipe that calls `function` with these values; sections not given are all defaults."""
    import fiddle as fdl

    _hide_this_file()
    _refuse_unknown("a recipe", values, schema(Settings))
    recipe = fdl.Partial(function, **values)
    with set_by(DEFAULTS, 0):
        for name, field in schema(Settings).items():
            if field.section and name not in values:
                setattr(recipe, name, config(field.section))
            elif isinstance(field.default, list) and name not in values:
                setattr(recipe, name, copy.copy(field.default))
    return recipe


def _refuse_unknown(what: str, values: dict[str, Any], valid: dict[str, Field]) -> None:
    """Raise TypeError, as Python does for an argument that a function does not take, with the names that were meant."""
    wrong = [f"{what} has no field {name}{nearest(name, valid)}" for name in values if name not in valid]
    if wrong:
        raise TypeError("; ".join(wrong))


def node_schema(node: "fdl.Buildable[Any]") -> dict[str, Field]:
    """The fields of a recipe or of one of its sections."""
    target = node.__fn_or_cls__
    return schema(target if dataclasses.is_dataclass(target) else Settings)


def value(node: "fdl.Buildable[Any]", name: str) -> Any:
    """The value of a field: what was set, else its default."""
    values = node.__arguments__
    return values[name] if name in values else copy.copy(node_schema(node)[name].default)


def last_set(node: "fdl.Buildable[Any]", name: str) -> "HistoryEntry | None":
    """The newest record of `name` being set in `node`; None if its value is the default."""
    from fiddle.history import ChangeKind

    if name not in node.__arguments__:
        return None
    entries = [entry for entry in node.__argument_history__[name] if entry.kind is ChangeKind.NEW_VALUE]
    return entries[-1] if entries and entries[-1].location.filename != DEFAULTS else None


@contextlib.contextmanager
def set_by(filename: str, line: int, text: str | None = None) -> Iterator[None]:
    """Record this as the place of every value set within the block."""
    from fiddle import history

    place: Location = history.Location(filename, line, text)
    with history.custom_location(lambda: place):
        yield


@cache
def _hide_this_file() -> None:
    """Let fiddle record the caller of `config` and `partial` as the place where a value was set."""
    from fiddle import history

    history.add_exclude_location("recipes/nodes.py")


def has_no_order(filename: str) -> bool:
    """Whether what this place says is meant all at once: a command line, a YAML file."""
    return filename == COMMAND_LINE or filename.endswith((".yaml", ".yml"))
