"""Overrides in NeMo-Run's grammar: `model.hidden_size=2048 trainer.max_steps*=2 data=mock model=@file.yaml`.

A value is read by the annotation of its field (see `typed`). A section takes the name of a part or of a recipe, whose
section of that kind is meant, a call such as `'stdlib(sequence_length=512)'`, the user's own `file.py:function`, or
`@file.yaml`. Overrides are applied from left to right; all that is wrong with any of them is reported at once.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, get_args

from hybrid import errors
from hybrid.config import CheckpointConfig
from hybrid.errors import ConfigError, Problem, nearest
from recipes import nodes, typed

if TYPE_CHECKING:
    import fiddle as fdl

OPERATORS = ("=", "+=", "-=", "*=", "/=", "|=")
_ARGUMENT = re.compile(r"(?P<key>[^=]*?)\s*(?P<operator>[+\-*/|&%^]?=)(?P<value>.*)", re.DOTALL)
_KEY = re.compile(r"[A-Za-z_]\w*(\[\d+\])?(\.[A-Za-z_]\w*(\[\d+\])?)*")


@dataclass(frozen=True)
class Override:
    """One `key operator value`; `path` holds the names of the key and the indices in brackets."""

    text: str
    key: str
    path: tuple[str | int, ...]
    operator: str
    value: str


def apply[Node: "fdl.Buildable[Any]"](recipe: Node, arguments: Sequence[str]) -> Node:
    """Return a copy of a recipe, or of any config of a dataclass, with the overrides applied.

    Raises ConfigError with every problem in them.
    """
    recipe = copy.deepcopy(recipe)
    problems: list[Problem] = []
    done: list[Override] = []
    for number, argument in enumerate(arguments, start=1):
        try:
            override = parse(argument)
            _refuse_lost(override, done)
            done.append(override)
            _set(recipe, override, number)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return recipe


def parse(argument: str) -> Override:
    """Return what an argument of the command line says. Raises ConfigError if it is no override."""
    found = _ARGUMENT.fullmatch(argument.strip())
    if not found:
        what = f"'{argument}' is not key=value" if argument.strip() else "an argument is empty"
        raise ConfigError(Problem("", f"{what}; write for example model.hidden_size=2048"))
    key, operator, value = found["key"], found["operator"], found["value"].strip()
    if not _KEY.fullmatch(key):
        raise ConfigError(
            Problem(argument, f"'{key}' is not a field; write its section and name, such as model.hidden_size")
        )
    if operator not in OPERATORS:
        raise ConfigError(Problem(key, f"'{operator}' is no operator of overrides; they are {' '.join(OPERATORS)}"))
    if not value:
        raise ConfigError(
            Problem(key, f"has nothing after '{operator}'; write a value, None for no value, '' in quotes for no text")
        )
    path = tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", key))
    return Override(argument.strip(), key, path, operator, value)


def _refuse_lost(new: Override, earlier: Sequence[Override]) -> None:
    """Raise ConfigError if an assignment would undo an earlier override without a word."""
    if new.operator != "=":
        return
    for old in earlier:
        if old.path == new.path:
            raise ConfigError(Problem(new.key, f"is given twice: '{old.text}' and '{new.text}'; leave one out"))
        if old.path[: len(new.path)] == new.path:
            raise ConfigError(Problem(new.key, f"'{new.text}' would undo '{old.text}'; write it before that"))


def _set(recipe: "fdl.Buildable[Any]", override: Override, number: int) -> None:
    """Apply one override, the `number`th of the command line, to `recipe` in place."""
    node, place = recipe, ""
    names = list(override.path)
    while True:
        name = names.pop(0)
        field = _field(node, place, name)
        place = f"{place}.{field.name}" if place else field.name
        if not names or field.section is None:
            break
        node = _section(node, field)
    if field.section:
        node, name, new = _new_section(node, field, override)
    elif names:
        name, new = field.name, _with_item(node, field, names, override)
    else:
        name, new = field.name, _result(override, field.annotation, nodes.value(node, field.name))
    with nodes.set_by(nodes.COMMAND_LINE, number, override.text):
        setattr(node, name, new)


def _field(node: "fdl.Buildable[Any]", place: str, name: str | int) -> nodes.Field:
    valid = nodes.node_schema(node)
    if name in valid:
        return valid[str(name)]
    detail = errors.names(str(name), valid)
    if isinstance(name, int):
        raise ConfigError(Problem(f"{place}[{name}]", "a section has names, not numbers", detail))
    if place:
        hint = nearest(name, valid) or _elsewhere(name)
        raise ConfigError(Problem(f"{place}.{name}", f"{place} has no field {name}{hint}", detail))
    if is_dataclass(target := node.__fn_or_cls__):  # an executor, or a section by itself
        what = getattr(target, "__name__", target)
        raise ConfigError(Problem(str(name), f"{what} has no field {name}{nearest(str(name), valid)}", detail))
    raise ConfigError(Problem(name, f"a recipe has no field {name}{_elsewhere(name) or nearest(name, valid)}", detail))


def _elsewhere(name: str) -> str:
    """'; did you mean SECTION.name?' where sections have such a field, else ''."""
    sections = [section for section, cls in nodes.SECTIONS.items() if name in nodes.schema(cls)]
    return f"; did you mean {' or '.join(f'{section}.{name}' for section in sections)}?" if sections else ""


def _section(node: "fdl.Buildable[Any]", field: nodes.Field) -> "fdl.Buildable[Any]":
    """The config of a section; made if the recipe leaves it out."""
    import fiddle as fdl

    assert field.section
    held = node.__arguments__.get(field.name)
    if held is None:
        held = nodes.config(field.section)
        setattr(node, field.name, held)
    if not isinstance(held, fdl.Buildable):
        raise ConfigError(Problem(field.name, f"the recipe holds {held!r} here instead of a config of the section"))
    return held


def _new_section(
    node: "fdl.Buildable[Any]", field: nodes.Field, override: Override
) -> tuple["fdl.Buildable[Any]", str, Any]:
    """What an override of a whole section sets: of which config, which field, to what."""
    from recipes import registry

    assert field.section
    if override.operator != "=":
        raise ConfigError(Problem(override.key, f"is a section: '{override.operator}' works on its fields, not on it"))
    section = _section(node, field)
    if field.section is CheckpointConfig and not override.value.startswith("@"):
        # `finetune RECIPE checkpoint=PATH`: the one thing that is said of this section in passing.
        return section, "load", typed.parse(override.value, str | None)
    present = {name: nodes.value(section, name) for name in nodes.node_schema(section)}
    return node, field.name, registry.resolve_section(field.name, override.value, present)


def _with_item(
    node: "fdl.Buildable[Any]", field: nodes.Field, path: Sequence[str | int], override: Override
) -> list[Any] | dict[str, Any]:
    """A list or dictionary field with one item changed: `data.split[0]=98`, `env.NCCL_DEBUG=INFO`."""
    items = copy.copy(nodes.value(node, field.name))
    kinds = get_args(field.annotation) or (Any,)
    match items, path:
        case list(), [int(index)] if index < len(items):
            items[index] = _result(override, kinds[0], items[index])
        case list(), [int()]:
            raise ConfigError(Problem(override.key, f"{field.name} has {len(items)} items, counted from 0"))
        case dict(), [str(name)]:
            items[name] = _result(override, kinds[-1], items.get(name))
        case _:
            what = f"{field.name} takes {typed.describe(field.annotation)} and has no fields of its own"
            raise ConfigError(Problem(override.key, what))
    return items


def _result(override: Override, annotation: Any, old: Any) -> Any:
    """The value of a field after the override. Raises ConfigError if there is none of the field's type."""
    key, operator = override.key, override.operator
    try:
        if operator == "=":
            return typed.parse(override.value, annotation)
        if old is None:
            raise ValueError(f"is None, so there is nothing for '{operator}' to change; set it with '='")
        if isinstance(old, bool) or not isinstance(old, int | float | str | list | dict):
            raise ValueError(f"is {old!r}, which '{operator}' cannot change; set it with '='")
        is_number = isinstance(old, int | float)
        operand = typed.parse(override.value, int | float if is_number else annotation)
        new = _operate(operator, old, operand)
        if isinstance(old, int) and isinstance(new, float) and new.is_integer():
            new = int(new)
        try:
            return typed.conform(new, annotation)
        except ValueError as error:
            raise ValueError(f"{old!r} {operator[0]} {override.value} makes {error}") from None
    except ValueError as error:
        raise ConfigError(Problem(key, str(error))) from None


def _operate(operator: str, old: Any, new: Any) -> Any:
    if isinstance(old, int | float):
        match operator:
            case "+=":
                return old + new
            case "-=":
                return old - new
            case "*=":
                return old * new
            case "/=" if new == 0:
                raise ValueError("cannot be divided by 0")
            case "/=":
                return old / new
    if operator == "+=" and isinstance(old, str | list):
        return old + new
    if operator == "-=" and isinstance(old, list):
        if missing := [item for item in new if item not in old]:
            raise ValueError(f"does not hold {missing[0]!r}, so '-=' cannot take it out")
        return [item for item in old if item not in new]
    if operator == "|=" and isinstance(old, dict):
        return old | new
    raise ValueError(f"is {typed.describe(type(old))}, which '{operator}' cannot change; set it with '='")
