"""What a recipe costs on the machine that it is meant for, as `hybrid.costs` has it."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hybrid import checks, run
from hybrid.config import Settings
from hybrid.costs import plan as costs
from hybrid.costs.plan import Plan
from hybrid.costs.search import Search, search
from hybrid.errors import ConfigError, Problem
from recipes.settle import check, settings

if TYPE_CHECKING:
    import fiddle as fdl

    from recipes.registry import Entry

# What a run cannot start without, but a plan can be made without: where files are, and how long it is.
_FILES = ("data.path", run.NO_CHECKPOINT.place)
_GPU = "h100"  # for recipes that name no machine


@dataclass(frozen=True)
class Planned:
    """A plan, and what is to be settled before the run can start all the same."""

    plan: Plan
    problems: list[Problem]
    note: str = ""  # what to know before believing it

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        problems = [{"place": problem.place, "message": problem.message} for problem in self.problems]
        return self.plan.as_dict() | {"problems": problems, "note": self.note}


def plan(
    recipe: "fdl.Partial[Any]",
    machine: "Entry | None" = None,
    gpu: str | None = None,
    gpus: int | None = None,
    mfu: float | None = None,
) -> Planned:
    """Return what a recipe costs on `gpus` GPUs, by default those of the `machine` it is meant for.

    Where the recipe has been changed such that this machine does not suit its layout, on the fewest that do. Raises
    ConfigError with everything that is wrong with the recipe, but for its length and files if it does not say them yet.
    """
    built, problems = _costed(recipe)
    if gpus is None and machine and machine.gpus and not checks.check(built, machine.gpus):
        gpus = machine.gpus
    made = costs.plan(built, gpu or _meant(machine), gpus, mfu)
    no_gpu = machine is not None and machine.gpu is None and gpu is None
    note = f"meant for a machine without GPU; times and memory are those of one {made.gpu}" if no_gpu else ""
    return Planned(made, problems, note)


def layouts(
    recipe: "fdl.Partial[Any]", machine: "Entry | None" = None, gpu: str | None = None, gpus: int | None = None
) -> Search:
    """Return the layouts of a recipe that fit on so many GPUs, fastest first. Raises ConfigError."""
    built, _ = _costed(recipe)
    wanted = gpus or (machine.gpus if machine else 0) or costs.smallest_world(built)
    return search(built, gpu or _meant(machine), wanted)


def _meant(machine: "Entry | None") -> str:
    return machine.gpu if machine and machine.gpu else _GPU


def _costed(recipe: "fdl.Partial[Any]") -> tuple[Settings, list[Problem]]:
    """The settings as their cost sees them, and the problems that do not matter for it."""
    problems = check(recipe)
    if serious := [it for it in problems if it.place not in _FILES and it != checks.NO_LENGTH]:
        raise ConfigError(serious)
    built = settings(recipe)
    if checks.NO_LENGTH in problems:
        built = replace(built, trainer=replace(built.trainer, max_steps=1))
    if any(problem.place == "data.path" for problem in problems):
        built = replace(built, data=replace(built.data, source="mock", path=None))
    return built, problems
