"""Executors by name: the kinds there are, and the user's own profiles.

Profiles are the entries of `executors.yaml` in the user's configuration folder (~/.config/hybrid-recipes; the variable
HYBRID_EXECUTORS names another file). A profile is of a kind, and has values for its fields:

    big:
      kind: slurm
      account: research
      nodes: 16
    cloud:
      kind: ~/clusters.py:cloud    # a function that returns any of nemo-run's executors
      gpus: 8
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from hybrid.errors import ConfigError, Problem, nearest
from recipes import nodes, overrides, registry, typed
from recipes.executors import KINDS, Executor

if TYPE_CHECKING:
    import nemo_run

PREFIX = "executor"


@dataclasses.dataclass(frozen=True)
class Profile:
    """A kind of executor with some of its fields set; `kind` is a name of `KINDS` or path/to/file.py:function."""

    kind: str
    values: dict[str, Any]

    @property
    def summary(self) -> str:
        """What `hybrid list executors` says about it."""
        if self.values:
            return ", ".join([self.kind, *(f"{name}={value}" for name, value in self.values.items())])
        return (KINDS[self.kind].__doc__ or "").partition("\n")[0] if self.kind in KINDS else self.kind


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the words of a command into overrides of the recipe and those of the executor."""
    own = [word for word in arguments if word.startswith(f"{PREFIX}.")]
    return [word for word in arguments if word not in own], own


def path() -> Path:
    """The file of the user's profiles."""
    if named := os.environ.get("HYBRID_EXECUTORS"):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hybrid-recipes" / "executors.yaml"


def profiles() -> dict[str, Profile]:
    """Every executor there is by name, the kinds first. Raises ConfigError for a file of profiles that is wrong."""
    found = {name: Profile(name, {}) for name in KINDS}
    if not path().is_file():
        return found
    from recipes.files import Document

    document = Document(path())
    for name, (key, node) in document.entries(document.root, "a file of executors").items():
        fields = document.entries(node, f"the executor {name}")
        kind = str(fields.pop("kind")[1].value) if "kind" in fields else ""
        if name in KINDS:
            document.problems.append(Problem(document.place(key), f"{name} is a kind of executor; name it otherwise"))
        elif kind in KINDS:
            valid = nodes.schema(KINDS[kind])
            document.refuse_unknown(fields, valid, name, ("kind",))
            values = {
                field: document.value(held, f"{name}.{field}", valid[field])
                for field, (_, held) in fields.items()
                if field in valid
            }
            found[name] = Profile(kind, values)
        elif ".py:" in kind:
            field = nodes.Field("", Any, "", "", None)
            values = {argument: document.value(held, argument, field) for argument, (_, held) in fields.items()}
            found[name] = Profile(kind, values)
        else:
            what = f"there is no kind '{kind}'{nearest(kind, KINDS)}" if kind else "the executor has no kind"
            detail = f"valid kinds: {', '.join(KINDS)}, or path/to/file.py:function"
            document.problems.append(Problem(document.place(key), f"{name}: {what}", detail))
    document.raise_problems()
    return found


def executor(name: str, arguments: Sequence[str] = ()) -> "Executor | nemo_run.Executor":
    """Return the executor that a name means, with overrides such as `executor.nodes=4`. Raises ConfigError.

    The name is that of a kind or a profile, or path/to/file.py:function, which returns one of nemo-run's executors.
    """
    if ".py:" in name:
        target, given = registry.split_call(name)
        return _override(registry.call(target, registry.load_function(target), given), arguments)
    known = profiles()
    if name not in known:
        detail = f"valid names: {', '.join(known)}, or path/to/file.py:function; your own ones are in {path()}"
        raise ConfigError(Problem("--executor", f"there is no executor '{name}'{nearest(name, known)}", detail))
    profile = known[name]
    if profile.kind in KINDS:
        return _build(KINDS[profile.kind], profile.values, arguments)
    function = registry.load_function(os.path.expanduser(profile.kind))
    given = ", ".join(f"{argument}={value!r}" for argument, value in profile.values.items())
    return _override(registry.call(profile.kind, function, given), arguments)


def _build(kind: type[Any], values: dict[str, Any], arguments: Sequence[str]) -> Any:
    """An executor of ours. Overrides have a recipe's grammar and errors, with the executor as the only section."""
    import fiddle as fdl

    holder = dataclasses.make_dataclass("Launch", [(PREFIX, kind)], kw_only=True)
    config: fdl.Config[Any] = nodes.config(holder, executor=nodes.config(kind, **values))
    return fdl.build(overrides.apply(config, arguments)).executor  # pyright: ignore[reportAttributeAccessIssue]


def _override(found: Any, arguments: Sequence[str]) -> Any:
    """An executor of nemo-run's with `executor.FIELD=VALUE` set, each by the field's type. Raises ConfigError."""
    if isinstance(found, tuple(KINDS.values())):
        values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        return _build(type(found), values, arguments)
    if not dataclasses.is_dataclass(found):
        raise ConfigError(Problem("--executor", f"{found!r:.60} is no executor"))
    problems = []
    hints = get_type_hints(type(found))
    valid = [field.name for field in dataclasses.fields(found) if field.init]
    for override in map(overrides.parse, arguments):
        name = override.key.removeprefix(f"{PREFIX}.")
        if name not in valid:
            message = f"a {type(found).__name__} has no field {name}{nearest(name, valid)}"
            problems.append(Problem(override.key, message, f"valid names: {', '.join(valid)}"))
        elif override.operator != "=":
            problems.append(Problem(override.key, f"'{override.operator}' is for our own executors; set it with '='"))
        else:
            try:
                setattr(found, name, typed.parse(override.value, hints[name]))
            except ValueError as error:
                problems.append(Problem(override.key, str(error)))
    if problems:
        raise ConfigError(problems)
    return found
