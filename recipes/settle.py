"""From a recipe to the settings of a run: types checked, the layer pattern settled against the ratios."""

import copy
import functools
from typing import TYPE_CHECKING, Any

from hybrid import checks, fields, run
from hybrid import pattern as patterns
from hybrid.config import Settings
from hybrid.errors import ConfigError, Problem
from recipes import nodes

if TYPE_CHECKING:
    import fiddle as fdl
    from fiddle.history import HistoryEntry

_RATIOS = {"attention_ratio": "*", "mlp_ratio": "-"}
_WARMUPS = ("warmup_samples", "warmup_steps", "warmup_tokens")
_TAKE_OUT = "to make the pattern from the ratios instead, set model.layer_pattern=None"


def settings(recipe: "fdl.Partial[Any]") -> Settings:
    """Build the settings that a recipe describes. Raises ConfigError with every problem in it."""
    return _build(settle(recipe))


def check(recipe: "fdl.Partial[Any]", world_size: int | None = None) -> list[Problem]:
    """Return everything that is wrong with a recipe, on `world_size` processes; empty if it can run."""
    try:
        problems = checks.check(settings(recipe), world_size)
    except ConfigError as error:
        return error.problems
    if recipe.__fn_or_cls__ is run.finetune and not recipe.checkpoint.load:
        problems.append(run.NO_CHECKPOINT)
    return problems


def settle(recipe: "fdl.Partial[Any]") -> "fdl.Partial[Any]":
    """Return a copy of `recipe` in which every value has its type and nothing contradicts the layer pattern.

    An explicit `model.layer_pattern` wins over the number of layers and the ratios that were there when it was set
    (a recipe gives ratios, its user a pattern): these become None. Those set after it, or together with it on the
    command line or in one file, must agree with it. Of steps and samples the newer one stays, and of the ways to give
    a warm-up. A run that was made shorter than its recipe's warm-up or final decay has a tenth of it for that. Raises
    ConfigError with every problem.
    """
    recipe = copy.deepcopy(recipe)
    problems = _wrong_sections(recipe)
    problems += fields.wrong_types(_build(recipe))
    if not problems:
        problems = [*_settle_pattern(recipe.model), *_settle_length(recipe.trainer)]
        _settle_warmup(recipe.optimizer)
    if problems:
        raise ConfigError(problems)
    _settle_schedule(recipe)
    return recipe


def _build(recipe: "fdl.Partial[Any]") -> Settings:
    import fiddle as fdl

    call: functools.partial[None] = fdl.build(recipe)  # pyright: ignore[reportAssignmentType]
    return Settings(**call.keywords)


def _wrong_sections(recipe: "fdl.Partial[Any]") -> list[Problem]:
    """Put defaults, in place, where the recipe leaves a section out or holds something else; return the latter."""
    import fiddle as fdl

    problems: list[Problem] = []
    for name, cls in nodes.SECTIONS.items():
        held = recipe.__arguments__.get(name)
        if isinstance(held, fdl.Config) and held.__fn_or_cls__ is cls:
            continue
        if name in recipe.__arguments__:
            problems.append(Problem(name, f"is {held!r:.60} instead of config({cls.__name__}, ...)"))
        with nodes.set_by(nodes.DEFAULTS, 0):
            setattr(recipe, name, nodes.config(cls))
    if "name" not in recipe.__arguments__:
        problems.append(Problem("name", "is not set; give the run a name"))
        recipe.name = ""
    return problems


def _settle_pattern(model: "fdl.Config[Any]") -> list[Problem]:
    """Clear what the layer pattern supersedes, in place; return what contradicts it."""
    values = {name: nodes.value(model, name) for name in ("layer_pattern", "num_layers", *_RATIOS)}
    if values["layer_pattern"] is not None:
        since = nodes.last_set(model, "layer_pattern")
        for name in ("num_layers", *_RATIOS):
            if values[name] is not None and _superseded(nodes.last_set(model, name), since):
                with nodes.set_by(nodes.SUPERSEDED, 0, patterns.PLACE):
                    setattr(model, name, None)
                values[name] = None
    try:
        pattern = patterns.settle(**values)
    except ConfigError as error:
        return error.problems
    if values["layer_pattern"] is None:
        return []
    problems: list[Problem] = []
    for name, symbol in _RATIOS.items():
        ratio, count = values[name], pattern.counts(include_mtp=False)[symbol]
        if ratio is not None and round(ratio * pattern.num_layers) != count:
            problems.append(
                Problem(
                    f"model.{name}",
                    f"is {ratio}, but {patterns.PLACE} '{pattern}' has {count} of {pattern.num_layers} layers of that "
                    f"kind; {_TAKE_OUT}, or leave model.{name} out",
                )
            )
    return problems


def _settle_length(trainer: "fdl.Config[Any]") -> list[Problem]:
    """Keep the newer of steps and samples, in place; return a problem if both were said and differ."""
    steps, samples = nodes.value(trainer, "max_steps"), nodes.value(trainer, "max_samples")
    if steps is None or samples is None:
        return []
    of_steps, of_samples = nodes.last_set(trainer, "max_steps"), nodes.last_set(trainer, "max_samples")
    if _superseded(of_samples, of_steps):
        with nodes.set_by(nodes.SUPERSEDED, 0, "trainer.max_steps"):
            trainer.max_samples = None
    elif _superseded(of_steps, of_samples):
        with nodes.set_by(nodes.SUPERSEDED, 0, "trainer.max_samples"):
            trainer.max_steps = None
    elif samples != steps * (batch := nodes.value(trainer, "global_batch_size")):
        message = (
            f"is {samples}, but trainer.max_steps is {steps} of {batch} samples each, {steps * batch}; leave one out"
        )
        return [Problem("trainer.max_samples", message)]
    return []


def _settle_warmup(optimizer: "fdl.Config[Any]") -> None:
    """Keep the newest of the warm-ups in samples, steps and tokens, in place; those said together all stay."""
    names = [name for name in _WARMUPS if nodes.value(optimizer, name) is not None]
    since = {name: nodes.last_set(optimizer, name) for name in names}
    for name in names:
        newer = next((other for other in names if _superseded(since[name], since[other])), None)
        if newer:
            with nodes.set_by(nodes.SUPERSEDED, 0, f"optimizer.{newer}"):
                setattr(optimizer, name, None)


def _settle_schedule(recipe: "fdl.Partial[Any]") -> None:
    """Fit a warm-up or final decay, in place, into a run that somebody else than its author has made too short for it.

    `trainer.max_steps=3` tries a recipe out and says nothing of its warm-up; where both were said, both stay.
    """
    built, trainer, optimizer = _build(recipe), recipe.trainer, recipe.optimizer
    length = "max_samples" if built.trainer.max_steps is None else "max_steps"
    since = nodes.last_set(trainer, length)
    if since is None or built.optimizer.decay_samples or fields.out_of_range(built):
        return
    samples = built.trainer.samples
    with nodes.set_by(nodes.SUPERSEDED, 0, f"trainer.{length}"):
        given = next((name for name in _WARMUPS if nodes.value(optimizer, name) is not None), None)
        if given and built.warmup_samples >= samples and _is_elsewhere(nodes.last_set(optimizer, given), since):
            setattr(optimizer, given, None)
            optimizer.warmup_samples = samples // 10
        decay = built.optimizer.wsd_decay_samples
        if decay and decay >= samples and _is_elsewhere(nodes.last_set(optimizer, "wsd_decay_samples"), since):
            optimizer.wsd_decay_samples = None


def fitted(recipe: "fdl.Partial[Any]") -> str:
    """Say what `settle` has made of the warm-up of a run that was made too short for it; '' if it left that alone."""
    entry = nodes.last_set(recipe.optimizer, "warmup_samples")
    if not entry or entry.new_value is None or entry.location.filename != nodes.SUPERSEDED:
        return ""
    return (
        f"{entry.location.function_name} ends the run within the warm-up of its recipe, so the warm-up is now "
        f"{entry.new_value} of the run's {_build(recipe).trainer.samples} samples; optimizer.warmup_steps=N sets it"
    )


def _is_elsewhere(entry: "HistoryEntry | None", newer: "HistoryEntry") -> bool:
    """Whether a value was superseded by what another function or the command line says."""
    if entry is None or not _superseded(entry, newer):
        return False
    place, since = entry.location, newer.location
    return (place.filename, place.function_name) != (since.filename, since.function_name)


def _superseded(entry: "HistoryEntry | None", newer: "HistoryEntry | None") -> bool:
    """Whether a value was there before the newer one, and not as a part of the same statement."""
    if entry is None or newer is None:
        return newer is not None
    place, since = entry.location, newer.location
    together = place == since or (place.filename == since.filename and nodes.has_no_order(place.filename))
    return not together and entry.sequence_id < newer.sequence_id
