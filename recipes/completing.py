"""What a shell offers when a word of the command is completed. Nothing is built, and a mistake offers nothing."""

import difflib
from pathlib import Path
from typing import Literal, get_args, get_origin

from hybrid.config import Settings
from recipes import nodes, profiles, records, registry
from recipes.executors import KINDS


def recipes(incomplete: str) -> list[tuple[str, str]]:
    """Names of recipes with their meaning, also within a variant as in `shrink(hyb`, and the variants."""
    before, parenthesis, name = incomplete.rpartition("(")
    found = [
        (f"{before}{parenthesis}{entry.name}{')' * incomplete.count('(')}", entry.summary)
        for entry in registry.entries().values()
        if entry.name.startswith(name)
    ]
    if not parenthesis:
        found += [
            (f"{variant}(", "a variant of a recipe") for variant in registry.variants() if variant.startswith(name)
        ]
    return found


def overrides(incomplete: str) -> list[tuple[str, str]]:
    """Fields of a recipe and of executors as `section.field=`, with their meaning; values where they are few."""
    key, equals, value = incomplete.partition("=")
    fields = _fields()
    if not equals:
        return [(f"{name}=", field.doc) for name, field in fields.items() if name.startswith(key)]
    if key not in fields:
        return []
    return [(f"{key}={choice}", "") for choice in _choices(key, fields[key]) if choice.startswith(value)]


def meant(option: str, *, near: bool) -> str:
    """The key that a word with dashes means: optimizer.lr for `--lr`, or with `near` name for `--nam`; '' if none."""
    name, keys = option.lstrip("-").replace("-", "_"), _fields()
    named = {key.rpartition(".")[2]: key for key in reversed(keys)} | {key: key for key in keys}
    found = difflib.get_close_matches(name, named, n=1, cutoff=0.75 if near else 1.0)
    return named[found[0]] if found else ""


def executors(incomplete: str) -> list[tuple[str, str]]:
    """Names of executors, one's own profiles too."""
    return [(name, it.summary) for name, it in profiles.profiles().items() if name.startswith(incomplete)]


def runs(incomplete: str) -> list[tuple[str, str]]:
    """Names of the runs in `runs`, the newest first."""
    return [(folder.name, "a run") for folder in records.folders() if folder.name.startswith(incomplete)]


def checkpoints(incomplete: str) -> list[tuple[str, str]]:
    """Names of runs, and folders: a checkpoint of any format is one."""
    typed = Path(incomplete)
    parent = typed if incomplete.endswith("/") else typed.parent
    folders = sorted(parent.glob("*/")) if parent.is_dir() else []
    named = [(f"{folder}/", "a folder") for folder in folders if str(folder).startswith(incomplete.rstrip("/"))]
    return runs(incomplete) + named


def _fields() -> dict[str, nodes.Field]:
    found: dict[str, nodes.Field] = {}
    for name, field in nodes.schema(Settings).items():
        found |= {name: field}
        if field.section:
            found |= {f"{name}.{key}": one for key, one in nodes.schema(field.section).items()}
    for kind in KINDS.values():
        found |= {f"{profiles.PREFIX}.{key}": one for key, one in nodes.schema(kind).items()}
    return found


def _choices(key: str, field: nodes.Field) -> list[str]:
    """The values that a field can take, where they can be counted."""
    if field.section:
        return list(registry.parts(key))
    annotations = [field.annotation, *get_args(field.annotation)]
    choices = [str(one) for it in annotations if get_origin(it) is Literal for one in get_args(it)]
    choices += [word for it in annotations if it is bool for word in ("True", "False")]
    return choices + (["None"] if type(None) in annotations else [])
