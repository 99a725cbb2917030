"""Recipes and parts by name, and everything else that a user may write where a recipe is expected."""

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hybrid import errors
from hybrid.errors import ConfigError, Problem, nearest
from recipes import nodes, typed

if TYPE_CHECKING:
    import fiddle as fdl

# The modules that hold recipes, in the order in which `hybrid list` shows them.
CATALOGUE = ("recipes.laptop", "recipes.seed", "recipes.study", "recipes.state_spaces", "recipes.nemotron_h")
RECIPE_FILE = "recipe.yaml"  # what a run's folder holds of the recipe it was started with
_CALL = re.compile(r"(?P<target>[^()]*\w)\((?P<arguments>.*)\)", re.DOTALL)
# What fiddle says to `recipe.model.hiden_size = 64`.
_SET_ON = re.compile(r"No parameter named '(?P<name>\w+)' exists for <\w+ '?(?P<what>[\w.]+).*>; [\w ]+: (?P<valid>.*)")
_MARK = "_recipe_entry"
_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Entry:
    """A recipe of the catalogue: its function, and the machine that its layout is meant for."""

    function: Callable[[], Any]
    gpu: str | None  # a name of hybrid.costs.hardware; None: a machine without GPU
    gpus: int

    @property
    def name(self) -> str:
        """The recipe's name is its function's."""
        return self.function.__name__

    @property
    def machine(self) -> str:
        """The machine in words: '8 x h100'."""
        return f"{self.gpus} x {self.gpu}" if self.gpu else "CPU"

    @property
    def summary(self) -> str:
        """What `hybrid list` says about it: the first line of the docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


def recipe[F: Callable[..., Any]](*, gpu: str | None = None, gpus: int = 0) -> Callable[[F], F]:
    """Mark a function of a catalogue module as a recipe, whose layout is meant for so many of these GPUs."""

    def mark(function: F) -> F:
        vars(function)[_MARK] = Entry(function, gpu, gpus)
        return function

    return mark


@cache
def entries() -> dict[str, Entry]:
    """The recipes of the catalogue by name. Nothing is built, so fiddle is not imported."""
    found: dict[str, Entry] = {}
    for module in CATALOGUE:
        for function in vars(importlib.import_module(module)).values():
            entry = getattr(function, _MARK, None)
            if isinstance(entry, Entry) and function.__module__ == module:
                assert entry.name not in found, f"two recipes are called {entry.name}"
                found[entry.name] = entry
    return found


def parts(section: str) -> dict[str, Callable[..., Any]]:
    """The parts that can be given to a section by name (`data=mock`)."""
    from recipes import parts

    return parts.BY_SECTION.get(section, {})


def variants() -> dict[str, Callable[..., Any]]:
    """The functions that make another recipe of a recipe (`finetune(hybrid_8b)`)."""
    from recipes import variants

    return {"finetune": variants.finetune, "shrink": variants.shrink}


def resolve(reference: str) -> "fdl.Partial[Any]":
    """Return the recipe that `reference` names.

    It is a name of the catalogue, the user's own `path/to/file.py:function`, either with arguments in parentheses, a
    variant of any of them such as `finetune(NAME)`, `@file.yaml`, or the folder of a run, which holds the recipe it was
    started with. Raises ConfigError.
    """
    from recipes import files

    reference = reference.strip()
    if not reference:
        raise ConfigError("the name of the recipe is empty; `hybrid list` shows the names")
    path = Path(reference.removeprefix("@"))
    if reference.startswith("@") or path.suffix in _YAML:
        return files.read_recipe(path)
    target, arguments = split_call(reference)
    found = _find(target, arguments)
    if found is _NOTHING and (path / RECIPE_FILE).is_file():
        return files.read_recipe(path / RECIPE_FILE)
    if found is _NOTHING:
        raise ConfigError(_unknown(reference, target))
    return _as_recipe(target, found)


def resolve_section(section: str, reference: str, present: Mapping[str, Any] | None = None) -> "fdl.Buildable[Any]":
    """Return the config that `reference` names for a section such as `data`.

    It is the name of a part, or anything that names a recipe, whose section is taken, or the user's own
    `path/to/file.py:function` that returns a section. A parameter without a default takes its value from `present`, the
    fields of the section to be replaced. Raises ConfigError.
    """
    import fiddle as fdl

    from recipes import files

    cls = nodes.SECTIONS[section]
    path = Path(reference.removeprefix("@"))
    if reference.startswith("@") or path.suffix in _YAML:
        return files.read_section(path, section)
    target, arguments = split_call(reference)
    if target in parts(section):
        return call(target, parts(section)[target], arguments, present=present)
    found = _find(target, arguments, present)
    if found is _NOTHING:
        valid = [*parts(section), *entries()]
        field = next(iter(nodes.schema(cls)))
        raise ConfigError(
            Problem(
                section,
                f"is a section, and '{reference}' is neither a part nor a recipe"
                f"{nearest(target, valid)}; single fields are set with {section}.{field}=...",
                f"valid names: {', '.join(valid)}, or @file.yaml, or path/to/file.py:function",
            )
        )
    if isinstance(found, fdl.Buildable) and found.__fn_or_cls__ is cls:
        return found
    return nodes.value(_as_recipe(target, found), section)


_NOTHING = object()


def _find(target: str, arguments: str, present: Mapping[str, Any] | None = None) -> Any:
    """What the function of a name returns; `_NOTHING` if there is none of this name."""
    if target in entries():
        return call(target, entries()[target].function, arguments)
    if target in variants():
        try:
            inner, *others = typed.split(arguments)
        except ValueError:
            raise ConfigError(Problem(target, f"wants a recipe, as in {target}(hybrid_8b)")) from None
        return call(target, variants()[target], ", ".join(others), first=(resolve(inner),))
    if _is_python(target):
        return call(target, load_function(target), arguments, present=present)
    return _NOTHING


def machine(reference: str) -> Entry | None:
    """The machine that a recipe's layout is meant for, as far as its function says; None if it does not."""
    target, arguments = split_call(reference.strip())
    if target in entries():
        return entries()[target]
    if target == "finetune":
        return machine(typed.split(arguments)[0])
    if _is_python(target):
        entry = getattr(load_function(target), _MARK, None)
        return entry if isinstance(entry, Entry) else None
    return None


def load_function(reference: str) -> Callable[..., Any]:
    """Return the function that `path/to/file.py:function` names. Raises ConfigError, also for what the file raises."""
    file, _, name = reference.rpartition(":") if not reference.endswith(".py") else (reference, "", "")
    path = Path(file)
    if not path.is_file():
        near = sorted(path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = nearest(path.name, [other.name for other in near])
        raise ConfigError(Problem(file, f"there is no such file{hint}"))
    module = _load_module(path.resolve(), file)
    functions = {
        key: held
        for key, held in vars(module).items()
        if inspect.isfunction(held) and held.__module__ == module.__name__
    }
    if name in functions:
        return functions[name]
    valid = [key for key in functions if not key.startswith("_")]
    detail = f"its functions: {', '.join(valid) or 'none'}"
    if not name:
        raise ConfigError(
            Problem(file, f"say which function, as in {file}:{valid[0] if valid else 'my_recipe'}", detail)
        )
    raise ConfigError(Problem(reference, f"{file} has no function {name}{nearest(name, valid)}", detail))


@cache
def _load_module(path: Path, shown: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"user_recipes_{path.stem}_{abs(hash(path)):x}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    # At the end, so that the file finds its neighbours and still no neighbour hides an installed package.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ConfigError(_raised(shown, path, error)) from error
    return module


def _raised(shown: str, path: Path, error: BaseException) -> Problem:
    """Say what the user's code raised, at its last line in the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    place = f"{shown}:{lines[-1]}" if lines and lines[-1] else shown
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    if misspelt := _misspelt(error):
        what, name, valid = misspelt
        detail = errors.names(name, valid, "hybrid list" if what == "recipes" else "hybrid show tiny")
        return Problem(place, f"{what} has no {name}{nearest(name, valid)}", detail)
    return Problem(place, f"raised {type(error).__name__}{': ' if text else ''}{text}")


def _misspelt(error: BaseException) -> tuple[str, str, list[str]] | None:
    """What of fiddle's or of this package lacks which name, and the names it has; None if it was something else."""
    import fiddle as fdl

    if isinstance(error, ImportError) and error.name_from and error.name in ("recipes", "recipes.parts"):
        return error.name, error.name_from, _public(sys.modules[error.name])
    if not isinstance(error, AttributeError):
        return None
    if set_on := _SET_ON.match(str(error)):
        return _called(set_on["what"].rpartition(".")[2]), set_on["name"], set_on["valid"].split(", ")
    if isinstance(error.obj, fdl.Buildable):
        return _called(error.obj.__fn_or_cls__.__name__), str(error.name), list(nodes.node_schema(error.obj))
    if isinstance(error.obj, ModuleType) and error.obj.__name__ in ("recipes", "recipes.parts"):
        return error.obj.__name__, str(error.name), _public(error.obj)
    return None


def _called(target: str) -> str:
    return "a recipe" if target in ("pretrain", "finetune") else target


def _public(module: ModuleType) -> list[str]:
    """The recipes and functions that a module of this package gives."""
    own = [name for name, held in vars(module).items() if getattr(held, "__module__", "") == module.__name__]
    return own if module.__name__ == "recipes.parts" else [*entries(), *vars(module)["_HOME"]]


def split_call(reference: str) -> tuple[str, str]:
    """Part `name(arguments)` into the name and the arguments; they are empty where there are no parentheses."""
    found = _CALL.fullmatch(reference)
    return (found["target"], found["arguments"]) if found else (reference, "")


def _is_python(target: str) -> bool:
    return target.endswith(".py") or ".py:" in target


def call(
    target: str,
    function: Callable[..., Any],
    arguments: str,
    *,
    first: tuple[Any, ...] = (),
    present: Mapping[str, Any] | None = None,
) -> Any:
    """Call a function with `first` and the arguments written in parentheses; what they leave out is in `present`."""
    try:
        signature = inspect.signature(function)
        hints = typed.hints(function)
        names = list(signature.parameters)[len(first) :]
        given: dict[str, Any] = {}
        for number, item in enumerate(typed.split(arguments)):
            name, equals, text = typed.cut(item, "=")
            name, text = (name.strip(), text) if equals else (names[number] if number < len(names) else "", item)
            if name not in names:
                what = f"takes no argument '{name}'{nearest(name, names)}" if name else "takes fewer arguments"
                raise ValueError(f"{what}; {'its arguments: ' + ', '.join(names) if names else 'it takes none'}")
            if name in given:
                raise ValueError(f"the argument {name} is there twice")
            try:
                given[name] = typed.parse(text, hints.get(name, Any))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        for name in names:
            if signature.parameters[name].default is inspect.Parameter.empty and present and name in present:
                given.setdefault(name, present[name])
        signature.bind(*first, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(Problem(target, str(error))) from None
    try:
        return function(*first, **given)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        if function.__module__.startswith("recipes."):
            raise
        raise ConfigError(_raised(target.rpartition(":")[0], Path(inspect.getfile(function)), error)) from error


def _as_recipe(target: str, found: Any) -> "fdl.Partial[Any]":
    import fiddle as fdl

    import hybrid.run

    if isinstance(found, fdl.Partial) and vars(hybrid.run).get(found.__fn_or_cls__.__name__) is found.__fn_or_cls__:
        return found
    what = "nothing; did you forget to return the recipe?" if found is None else f"{found!r:.60}"
    if isinstance(found, fdl.Buildable):
        what = f"a config of {found.__fn_or_cls__.__name__}"
    raise ConfigError(
        Problem(target, f"is no recipe: it returned {what}", "a recipe is partial(pretrain, name=..., model=..., ...)")
    )


def _unknown(reference: str, target: str) -> Problem:
    if "/" in reference or reference.endswith("."):
        return Problem(
            reference,
            "there is no such recipe, and no folder of a run there",
            "a recipe is a name (`hybrid list`), path/to/file.py:function, @file.yaml, or the folder of a run",
        )
    return Problem(
        reference,
        f"there is no recipe of this name{nearest(target, entries())}",
        f"valid names: {', '.join(entries())}, or path/to/file.py:function, or @file.yaml",
    )
