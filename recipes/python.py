"""Recipes as Python source: a file with one function that returns an equal recipe."""

import json
import keyword
import re
from typing import TYPE_CHECKING, Any

from recipes import nodes
from recipes.settle import settle

if TYPE_CHECKING:
    import fiddle as fdl


def to_python(recipe: "fdl.Partial[Any]") -> str:
    """Return Python source whose function returns a recipe equal to the settled one. Defaults are left out.

    Saved as a file, it is a recipe of the user's own: `path/to/file.py:function`. Raises ConfigError for a recipe that
    cannot be settled.
    """
    recipe = settle(recipe)
    task = recipe.__fn_or_cls__.__name__
    classes = ", ".join(sorted(cls.__name__ for cls in nodes.SECTIONS.values()))
    lines = [
        f"from hybrid.config import {classes}",
        f"from hybrid.run import {task}",
        "from recipes import config, partial",
        "",
        "",
        f"def {function_name(recipe.name)}():",
        "    return partial(",
        f"        {task},",
    ]
    for name, field in nodes.node_schema(recipe).items():
        value = nodes.value(recipe, name)
        if field.section is None:
            lines += [f"        {name}={_literal(value)},"] if value != field.default else []
            continue
        differences = [
            f"            {inner}={_literal(held)},"
            for inner, inner_field in nodes.node_schema(value).items()
            if (held := nodes.value(value, inner)) != inner_field.default
        ]
        if differences:
            lines += [f"        {name}=config(", f"            {field.section.__name__},", *differences, "        ),"]
        else:
            lines.append(f"        {name}=config({field.section.__name__}),")
    return "\n".join([*lines, "    )", ""])


def function_name(name: str) -> str:
    """A recipe's name as the name of a Python function."""
    plain = re.sub(r"\W", "_", name)
    return f"recipe_{plain}" if not plain.isidentifier() or keyword.iskeyword(plain) else plain


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)
