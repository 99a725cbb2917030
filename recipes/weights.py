"""Weights that a run starts from and leaves behind in any format, not only in that of training.

`checkpoint.load` may be whatever `hybrid inspect` knows. What is not a distributed checkpoint of the same shape is
converted once, by the run's first process, into a folder beside the runs. `checkpoint.export` is FORMAT:PATH, and is
written when the last step is done. All of it is checked on the machine that starts the run.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid import weight_fields
from hybrid.config import ModelConfig, Settings
from hybrid.errors import ConfigError, Problem, UserError
from hybrid.pattern import CONVERTED
from hybrid.training import folder
from recipes.settle import settings

if TYPE_CHECKING:
    import fiddle as fdl

    from converters.checkpoint import Checkpoint

CACHE = ".converted"
"""Where converted checkpoints are kept, in the folder of the runs."""

_LOAD, _EXPORT = "checkpoint.load", "checkpoint.export"
_TOLD_SECONDS = 10.0  # between two lines about the progress of a conversion


def check(built: Settings) -> list[Problem]:
    """What is wrong with where the weights come from and go to, as this machine sees it."""
    problems: list[Problem] = []
    for place, look in ((_LOAD, _source), (_EXPORT, _target)):
        try:
            look(built)
        except ConfigError as error:
            problems += [
                problem if problem.place.startswith(("checkpoint.", "model.")) else Problem(place, str(problem))
                for problem in error.problems
            ]
        except UserError as error:
            problems.append(Problem(place, str(error)))
    return problems


def path_of(reference: str) -> str:
    """The path in FORMAT:PATH, or the whole of it."""
    from converters.convert import FORMATS

    name, colon, path = reference.partition(":")
    return path if colon and name in FORMATS else reference


def run(recipe: "fdl.Partial[Any]") -> None:
    """Run a settled recipe as one rank of the processes there are: what it starts from, the training, the export."""
    import fiddle as fdl

    built = settings(recipe)
    fdl.build(localize(recipe, built))()
    export(built)


def localize(recipe: "fdl.Partial[Any]", built: Settings) -> "fdl.Partial[Any]":
    """Return the recipe with a `checkpoint.load` that training reads, converted if need be.

    For every process of a run: the first one converts, the others wait for it. Raises as `converters.convert`, and
    ConfigError for weights of another model.
    """
    source = _source(built)
    if source is None:
        return recipe
    found = source.path if _loads(source, built.model) else _converted(source, built)
    recipe = copy.deepcopy(recipe)
    recipe.checkpoint.load = str(found)
    return recipe


def export(built: Settings) -> None:
    """Write the weights of a run that is done to `checkpoint.export`; nothing if it is not done, or was exported."""
    if built.checkpoint.export is None or int(os.environ.get("RANK", "0")) or not _done(built):
        return
    from converters import convert

    to, target = _form(built.checkpoint.export)
    if target.exists() and any(target.iterdir()):
        print(f"{target} is there already; nothing is exported", flush=True)
        return
    opened = convert.open_checkpoint(_run(built))
    try:
        origin = _origin(built)  # whose settings of generation go along
    except (ConfigError, UserError):  # it need not be there any more
        origin = None
    others = [path for path in (origin.companions if origin else []) if path.name == "generation_config.json"]
    opened = replace(opened, companions=[*opened.companions, *others], hf_config=origin.hf_config if origin else {})
    result = convert.convert(opened, target, to, report=_telling(f"exports to {target}"))
    print(f"exported {result}", flush=True)


def _source(built: Settings) -> "Checkpoint | None":
    """What the run starts from, opened; None if that is nothing, or a checkpoint of its own.

    None, too, if the model has layers that the converters do not know: training reads checkpoints of this project, and
    compares models, itself.
    """
    goes_on = folder.latest_step(_run(built) / folder.CHECKPOINTS) is not None
    if set(built.model.pattern.layers + built.model.pattern.mtp) - set(CONVERTED):
        if built.checkpoint.load and not goes_on:
            folder.find_checkpoint(built.checkpoint.load, built.folder)
        return None
    opened = None if goes_on else _origin(built)
    if opened is None:
        return None
    opened.require_complete()
    opened.require_expressed()
    if problems := list(_differences(built.model, opened)):
        raise ConfigError(problems)
    return opened


def _origin(built: Settings) -> "Checkpoint | None":
    from converters import convert

    load = built.checkpoint.load
    if not load:
        return None
    run = Path(built.folder) / load
    return convert.open_checkpoint(run if (run / folder.CHECKPOINTS).is_dir() else load)


def _differences(model: ModelConfig, opened: "Checkpoint") -> Iterator[Problem]:
    """Why the weights in a checkpoint are of another model than the run's."""
    other, place = opened.model, str(opened.path)
    if other.pattern.layers != model.pattern.layers:
        message = f"is '{model.pattern}', but the weights in {place} are of '{other.pattern}'"
        yield Problem("model.layer_pattern", message)
    if model.pattern.mtp_depths > other.pattern.mtp_depths:
        message = f"is '{model.pattern}', but {place} has weights for {other.pattern.mtp_depths} tokens further ahead"
        yield Problem("model.layer_pattern", message)
    assumed = {note.split("=")[0] for note in opened.assumed}
    for name, (here, there) in weight_fields.differing(model, other).items():
        if name not in assumed:
            yield Problem(f"model.{name}", f"is {here}, but the weights in {place} are of {there}")
    if model.vocab_size > other.padded_vocab_size or other.vocab_size > model.padded_vocab_size:
        message = f"is {model.vocab_size}, but the weights in {place} are of {other.vocab_size}"
        yield Problem("model.vocab_size", message)


def _loads(opened: "Checkpoint", model: ModelConfig) -> bool:
    """Whether training loads a checkpoint as it is."""
    return opened.format == "torch_dist" and opened.model.padded_vocab_size == model.padded_vocab_size


def _converted(opened: "Checkpoint", built: Settings) -> Path:
    from converters import convert, torch_dist

    rows = (built.model.vocab_size, built.model.vocab_size_multiple)
    target = convert.torch_dist_folder(opened, Path(built.folder) / CACHE, rows)
    if int(os.environ.get("RANK", "0")):
        while (found := torch_dist.find(target)) is None:
            time.sleep(0.5)  # whoever started the processes ends this one if the first one fails
        return found
    found = convert.as_torch_dist(opened, target.parent, vocabulary=rows, report=_telling(f"converts {opened.path}"))
    print(f"{opened.path} is converted: {found}", flush=True)
    return found


def _target(built: Settings) -> None:
    """Raise ConfigError if the model cannot be exported as it is asked, or not to there."""
    if built.checkpoint.export is None:
        return
    from converters import hf

    to, target = _form(built.checkpoint.export)
    if to == "hf":
        hf.choose(built.model)
    if target.exists() and (target.is_file() or any(target.iterdir())) and not _done(built):
        raise ConfigError(Problem(_EXPORT, f"names {target}, which exists already; name another folder, or remove it"))


def _form(reference: str) -> tuple[str, Path]:
    from converters.convert import FORMATS

    name, colon, path = reference.partition(":")
    if not colon or name not in FORMATS or not path:
        names = ", ".join(f"{form}:PATH" for form in FORMATS)
        raise ConfigError(Problem(_EXPORT, f"is '{reference}', which is not one of {names}"))
    return name, Path(path)


def _done(built: Settings) -> bool:
    return folder.latest_step(_run(built) / folder.CHECKPOINTS) == built.trainer.steps


def _run(built: Settings) -> Path:
    return Path(built.folder) / built.name


def _telling(what: str) -> Callable[[Any], None]:
    """A report that prints a line now and then."""
    last = time.monotonic()

    def report(progress: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _TOLD_SECONDS:
            last = now
            print(f"{what}: {progress}", flush=True)

    return report
