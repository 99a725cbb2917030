"""Recipes for nemo-run: what `nemo_run.run` and `Experiment.add` take."""

from typing import TYPE_CHECKING, Any

from recipes.settle import settle

if TYPE_CHECKING:
    import fiddle as fdl
    import nemo_run


def to_nemo_run(recipe: "fdl.Partial[Any]") -> "nemo_run.Partial[Any]":
    """Return the settled recipe as a `nemo_run.Partial`, which `nemo_run.run` and `Experiment.add` take.

    nemo-run sends it to the job as compressed JSON; nothing of this recipe is lost on that way. Imports nemo-run.
    Raises ConfigError for a recipe that cannot be settled.
    """
    import fiddle as fdl
    import nemo_run

    recipe = settle(recipe)
    converted = nemo_run.Partial(recipe.__fn_or_cls__)
    for name, value in recipe.__arguments__.items():
        if isinstance(value, fdl.Buildable):
            section, value = value, nemo_run.Config(value.__fn_or_cls__)
            for inner, held in section.__arguments__.items():
                setattr(value, str(inner), held)
        setattr(converted, str(name), value)
    return converted
