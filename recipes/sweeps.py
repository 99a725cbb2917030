"""Sweeps: every combination of the values that overrides name, as runs of their own, and one table of what came out.

`hybrid pretrain tiny --sweep model.layer_pattern=M-M-,M-M* optimizer.lr=1e-3,3e-3` makes the runs tiny-1 to tiny-4. On
this machine they run one after the other, on a Slurm cluster as an array of jobs.
"""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid import atomic
from hybrid.checks import check
from hybrid.costs.plan import smallest_world
from hybrid.errors import ConfigError, Problem
from hybrid.training.folder import writable
from recipes import nodes, overrides, processes, records, typed, watching
from recipes.executors import Executor, Local, Slurm
from recipes.launching import absent, note_what_was_fitted, prepare, require_memory, until_interrupted
from recipes.records import SWEEP_FILE
from recipes.settle import settle
from recipes.submitting import Member, submit

if TYPE_CHECKING:
    import fiddle as fdl
    import nemo_run

_SECONDS = 3.0  # between two looks at the runs


@dataclass(frozen=True)
class Point:
    """One combination: the values by key, and the overrides that say them and all else."""

    values: dict[str, str]
    arguments: list[str]


@dataclass
class Row:
    """What came out of one run of a sweep. `validation` holds losses by the name of the held-out set."""

    run: str
    values: dict[str, str]
    status: str = "unknown"
    step: int | None = None
    loss: float | None = None
    validation: dict[str, float | None] = field(default_factory=dict)


def expand(arguments: Sequence[str]) -> list[Point]:
    """Return the combinations of overrides of which some name several values, parted by commas.

    Commas in brackets or quotes part nothing: `data.split=[99,1,0]` is one value. Raises ConfigError.
    """
    choices: list[list[str]] = []
    for argument in arguments:
        override = overrides.parse(argument)
        try:
            values = typed.split(override.value)
        except ValueError as error:
            raise ConfigError(Problem(override.key, str(error))) from None
        choices.append([f"{override.key}{override.operator}{value}" for value in values])
    swept = [number for number, options in enumerate(choices) if len(options) > 1]
    if not swept:
        raise ConfigError(
            Problem("--sweep", "no override names several values; write for example optimizer.lr=1e-3,3e-3")
        )
    keys = [overrides.parse(choices[number][0]).key for number in swept]
    problems = [
        Problem(key, "is swept twice; name all its values in one override") for key in set(keys) if keys.count(key) > 1
    ]
    problems += [
        Problem(overrides.parse(options[0]).key, "names a value twice")
        for options in choices
        if len(set(options)) < len(options)
    ]
    if "name" in keys:
        problems.append(Problem("name", "is that of the whole sweep, whose runs get numbers; give one"))
    if problems:
        raise ConfigError(problems)
    points = []
    for chosen in itertools.product(*choices):
        parsed = [overrides.parse(chosen[number]) for number in swept]
        points.append(Point({override.key: override.value for override in parsed}, list(chosen)))
    return points


def launch_sweep(
    points: Sequence[Point],
    recipe_of: "Callable[[list[str]], fdl.Partial[Any]]",
    executor: "Executor | nemo_run.Executor | None" = None,
    *,
    detach: bool = False,
    dry_run: bool = False,
) -> int:
    """Run a recipe once for each point of a sweep: here one after the other, on Slurm as an array of jobs.

    `recipe_of` makes the recipe of a list of overrides. The runs are named after it and numbered from 1. Prints a table
    at the end; returns the first exit code that is not 0. Raises ConfigError with everything that is wrong with any of
    them, UserError if Slurm refuses.
    """
    executor = executor or Local()
    if not isinstance(executor, Local | Slurm) or (detach and isinstance(executor, Local)):
        raise ConfigError(Problem("--sweep", "runs attached on this machine, or on a Slurm cluster"))
    members, problems = [], []
    for number, point in enumerate(points, start=1):
        recipe = settle(recipe_of(point.arguments))
        recipe.name = f"{nodes.value(recipe, 'name')}-{number}"
        try:
            members.append(prepare(recipe))
        except ConfigError as error:
            problems += error.problems
            continue
        built = members[-1].built
        count = executor.processes(smallest_world(built))
        wrong = check(built, count)
        wrong += absent(built, executor, dry_run=dry_run)
        problems += [replace(problem, place=f"{built.name}: {problem.place}") for problem in wrong]
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    if isinstance(executor, Local):
        require_memory([member.built for member in members], executor, dry_run=dry_run)
    for member in members:
        watching.refuse_under_way(member.folder)
    note_what_was_fitted(members)
    name = members[0].built.name.removesuffix("-1")
    folder = members[0].folder.parent / name
    if records.is_run(folder) and not is_sweep(folder):
        message = f"there is a run '{name}', which the sweep's table would hide; name the sweep otherwise (name=...)"
        raise ConfigError(Problem("name", message))
    if isinstance(executor, Local):
        if not dry_run:
            _remember(folder, points, members)
        code = _queue(members, executor, dry_run=dry_run)
    else:
        if submit(members, name, executor, repeat=1, dry_run=dry_run):
            _remember(folder, points, members)
            record = records.read(members[0].folder)
            assert record
            print(f"{name} is sent as job {record.ids[0].partition('_')[0]}, {len(members)} runs", flush=True)
        code = 0 if dry_run or detach else until_interrupted(folder, follow)
    if not dry_run and not detach:
        print(table(rows(folder)))
    return code


def _queue(members: Sequence[Member], executor: Local, *, dry_run: bool) -> int:
    """Run the members on this machine, one after the other; returns the first exit code that is not 0."""
    codes = []
    for member in members:
        if not dry_run:
            print(f"== {member.built.name}", flush=True)
        count = executor.processes(smallest_world(member.built))
        codes.append(
            processes.launch(
                member.recipe, member.built, executor, count, detach=False, dry_run=dry_run, own_process=True
            )
        )
        if codes[-1] in (130, 143):  # the sweep was asked to stop
            break
    return next((code for code in codes if code), 0)


def _remember(folder: Path, points: Sequence[Point], members: Sequence[Member]) -> None:
    """Write down in the sweep's folder which run has which values."""
    entries = [
        {"run": str(member.folder.absolute()), "values": point.values}
        for member, point in zip(members, points, strict=True)
    ]
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(folder / SWEEP_FILE, json.dumps(entries, indent=1) + "\n")


def _runs(folder: Path) -> dict[Path, dict[str, str]]:
    """The folders of a sweep's runs, each with its values by key. Raises ConfigError if the file is damaged."""
    try:
        return {Path(entry["run"]): entry["values"] for entry in json.loads((folder / SWEEP_FILE).read_text())}
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"cannot be read as the runs of a sweep ({error}); each of them still has its folder"
        raise ConfigError(Problem(str(folder / SWEEP_FILE), message)) from None


def rows(folder: Path) -> list[Row]:
    """How the runs of a sweep stand and what came out of them. Raises UserError if their machine does not answer."""
    found = []
    for run, values in _runs(folder).items():
        row = Row(run.name, values)
        if run.is_dir():
            state = watching.state(run)
            row.status, row.step, row.loss, row.validation = state.status, state.step, state.loss, state.validation
        found.append(row)
    return found


def follow(folder: Path) -> int:
    """Say when a run of a sweep begins and ends, until all have ended; returns the first exit code that is not 0."""
    said: dict[str, str] = {}
    runs = list(_runs(folder))
    while True:
        states = {run.name: watching.state(run) for run in runs}
        for name, state in states.items():
            if said.get(name) != state.status:
                said[name] = state.status
                print(f"{name} is {state.status}{f': {state.detail}' if state.detail else ''}", flush=True)
        if not any(state.status in ("queued", "running") for state in states.values()):
            return next((state.code for state in states.values() if state.code), 0)
        time.sleep(_SECONDS)


def table(found: Sequence[Row]) -> str:
    """The rows as text. A star marks the run with the lowest loss, of the first held-out set where there is one."""
    keys = list(found[0].values)
    held_out = sorted({name for row in found for name in row.validation})
    losses = [row.validation.get(held_out[0]) if held_out else row.loss for row in found]
    known = [(loss, number) for number, loss in enumerate(losses) if loss is not None]
    best = found[min(known)[1]] if known else None
    lines = [["run", *keys, "state", "step", "loss", *(f"{name} loss" for name in held_out)]]
    for row in found:
        numbers = [row.loss, *(row.validation.get(name) for name in held_out)]
        shown = ["" if number is None else f"{number:.4f}" for number in numbers]
        values = [row.values[key] for key in keys]
        lines.append([row.run, *values, row.status, "" if row.step is None else str(row.step), *shown])
        if row is best:
            lines[-1][-1] += " *"
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def under_way(folder: Path) -> list[Path]:
    """The folders of a sweep's runs that are queued or running. Raises ConfigError if there is none."""
    found = [run for run in _runs(folder) if run.is_dir() and watching.state(run).status in ("queued", "running")]
    if not found:
        raise ConfigError(Problem(folder.name, "none of its runs is queued or running"))
    return found


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / SWEEP_FILE).is_file()
