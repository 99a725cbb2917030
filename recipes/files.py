"""Recipes as YAML: written for people to read and change, read back to an equal recipe.

    version: 1
    task: pretrain
    name: my-run
    model:
      hidden_size: 1024
      ...

A file may leave out what it wants at its default. What it holds beyond the known fields is refused by name.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import hybrid.run
from hybrid import errors
from hybrid.config import Settings
from hybrid.errors import ConfigError, Problem, nearest
from recipes import nodes, typed
from recipes.settle import settle

if TYPE_CHECKING:
    import fiddle as fdl
    import yaml

VERSION = 1
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp")}
_HEAD = ("version", "task")


def to_yaml(recipe: "fdl.Partial[Any]") -> str:
    """Return the whole recipe as YAML, each field with its meaning; `read_recipe` makes an equal recipe of it.

    What is written is the settled recipe: a file says everything at once, so it can hold nothing that was superseded.
    Raises ConfigError for a recipe that cannot be settled.
    """
    recipe = settle(recipe)
    lines = [f"version: {VERSION}", f"task: {recipe.__fn_or_cls__.__name__}"]
    for name, field in nodes.node_schema(recipe).items():
        held = nodes.value(recipe, name)
        if field.section is None:
            lines.append(f"{name}: {_scalar(held)}")
            continue
        lines.append(f"{name}:")
        for inner, inner_field in nodes.node_schema(held).items():
            lines.append(f"  {f'{inner}: {_scalar(nodes.value(held, inner))}':<44}  # {inner_field.doc}")
    return "\n".join(lines) + "\n"


def read_recipe(path: Path) -> "fdl.Partial[Any]":
    """Return the recipe in a YAML file. Raises ConfigError with every problem, each with its line."""
    document = Document(path)
    entries = document.entries(document.root, "a recipe")
    task = document.take_head(entries)
    valid = nodes.schema(Settings)
    document.refuse_unknown(entries, valid, "a recipe", _HEAD)
    recipe = nodes.partial(getattr(hybrid.run, task)) if task else None
    for name, (key, node) in entries.items():
        if recipe is not None and (field := valid.get(name)):
            with document.location(key):
                new = document.section(node, name) if field.section else document.value(node, name, field)
                setattr(recipe, name, new)
    if "name" not in entries:
        document.problems.append(Problem(str(path), "the recipe has no name; write name: my-run"))
    document.raise_problems()
    assert recipe is not None
    return recipe


def read_section(path: Path, section: str) -> "fdl.Config[Any]":
    """Return a section in a YAML file, which holds its fields or a whole recipe. Raises ConfigError."""
    document = Document(path)
    entries = document.entries(document.root, f"the section {section}")
    if any(name in entries for name in (*_HEAD, *nodes.SECTIONS)):
        recipe = read_recipe(path)
        return nodes.value(recipe, section)
    found = document.section(document.root, section)
    document.raise_problems()
    return found


class Document:
    """A YAML file by nodes, so that every problem and every value has its line. Raises ConfigError if it is none."""

    def __init__(self, path: Path):
        import yaml

        self.path, self.problems = path, list[Problem]()
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            near = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            raise ConfigError(Problem(str(path), f"there is no such file{nearest(path.name, near)}")) from None
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(Problem(str(path), f"cannot be read as text: {why}")) from None
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f"{path}:{mark.line + 1}" if mark else str(path)
            raise ConfigError(Problem(place, f"is not YAML: {error.problem}")) from None
        except yaml.YAMLError as error:
            raise ConfigError(Problem(str(path), f"is not YAML: {error}")) from None
        if root is None:
            raise ConfigError(Problem(str(path), "is empty"))
        self.root = root

    def place(self, node: "yaml.Node") -> str:
        return f"{self.path}:{node.start_mark.line + 1}"

    def location(self, node: "yaml.Node") -> Any:
        return nodes.set_by(str(self.path), node.start_mark.line + 1)

    def raise_problems(self) -> None:
        if self.problems:
            raise ConfigError(self.problems)

    def entries(self, node: "yaml.Node", what: str) -> dict[str, tuple["yaml.Node", "yaml.Node"]]:
        """The entries of a mapping by name, as nodes of key and value."""
        import yaml

        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                [*self.problems, Problem(self.place(node), f"{what} is a mapping, one 'name: value' a line")]
            )
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, held in node.value:
            name = str(key.value)
            if name in found:
                self.problems.append(Problem(self.place(key), f"{name} is there twice"))
            found[name] = (key, held)
        return found

    def take_head(self, entries: dict[str, tuple["yaml.Node", "yaml.Node"]]) -> str | None:
        """Check the version; return the name of the task, None if it is none."""
        if "version" in entries and entries["version"][1].value != str(VERSION):
            key, held = entries["version"]
            self.problems.append(
                Problem(
                    self.place(key),
                    f"the file is a recipe of version {held.value}, and this program reads version {VERSION}; compare "
                    f"it with `hybrid show NAME --format yaml`, and when it is right, write version: {VERSION}",
                )
            )
            self.raise_problems()
        if "task" not in entries:
            return "pretrain"
        key, held = entries["task"]
        tasks = [
            name for name, function in vars(hybrid.run).items() if getattr(function, "__module__", "") == "hybrid.run"
        ]
        if held.value in tasks:
            return str(held.value)
        message = f"there is no task {held.value!r}{nearest(str(held.value), tasks)}"
        self.problems.append(Problem(self.place(key), message, f"valid names: {', '.join(tasks)}"))
        return None

    def refuse_unknown(
        self, entries: dict[str, tuple["yaml.Node", "yaml.Node"]], valid: Any, what: str, also: tuple[str, ...] = ()
    ) -> None:
        for name, (key, _) in entries.items():
            if name not in valid and name not in also:
                message = f"{what} has no field {name}{nearest(name, valid)}"
                self.problems.append(Problem(self.place(key), message, errors.names(name, valid)))

    def section(self, node: "yaml.Node", name: str) -> "fdl.Config[Any]":
        cls = nodes.SECTIONS[name]
        entries = self.entries(node, f"the section {name}")
        valid = nodes.schema(cls)
        self.refuse_unknown(entries, valid, name)
        found = nodes.config(cls)
        for field_name, (key, held) in entries.items():
            if field := valid.get(field_name):
                with self.location(key):
                    setattr(found, field_name, self.value(held, f"{name}.{field_name}", field))
        return found

    def value(self, node: "yaml.Node", name: str, field: nodes.Field) -> Any:
        """A field's value."""
        try:
            return _value(node, field.annotation)
        except ValueError as error:
            self.problems.append(Problem(f"{self.place(node)}: {name}", str(error)))
            return None


def _value(node: "yaml.Node", annotation: Any) -> Any:
    """A value of this type. Words without quotes are read as on the command line: YAML takes `1e-4` for text."""
    import yaml

    if isinstance(node, yaml.ScalarNode) and node.style is None and node.tag in _PLAIN:
        return typed.parse(node.value or "None", annotation)
    if isinstance(node, yaml.SequenceNode) and get_origin(annotation) is list:
        return [_value(item, get_args(annotation)[0]) for item in node.value]
    try:
        held = yaml.SafeLoader("").construct_object(node, deep=True)
    except yaml.YAMLError as error:
        raise ValueError(f"cannot be read: {error}") from None
    return typed.conform(held, annotation)


def _scalar(value: Any) -> str:
    """A value on one line of YAML, such that `_value` and any other reader of YAML take it for the same."""
    import yaml

    if value is None:
        return "null"
    # In quotes: what cannot be seen, and what the command line would take for None or in quotes of its own.
    quoted = isinstance(value, str) and (
        not value.isprintable() or value.lower() == "none" or typed.unquote(value) != value
    )
    text = yaml.safe_dump(
        value, default_flow_style=True, default_style='"' if quoted else None, width=10**9, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
