"""Starting a recipe on an executor."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.checks import check, require
from hybrid.config import Settings
from hybrid.costs.plan import smallest_world
from hybrid.errors import ConfigError, Problem
from hybrid.training import checksums
from hybrid.training.folder import CHECKPOINTS, checkpoint_folder, finished, latest_step, refuse_other_run
from recipes import containers, host_memory, processes, records, watching, weights
from recipes.executors import Docker, Executor, Local, Slurm
from recipes.settle import fitted, settings, settle
from recipes.submitting import Member, submit

if TYPE_CHECKING:
    import fiddle as fdl
    import nemo_run


def launch(
    recipe: "fdl.Partial[Any]",
    executor: "Executor | nemo_run.Executor | None" = None,
    *,
    detach: bool = False,
    dry_run: bool = False,
    repeat: int = 1,
) -> int:
    """Check a recipe and run it on an executor, by default this machine; returns the exit code of the run.

    The executor is one of ours (`local`, `slurm`, `docker`) or any of nemo-run's. `dry_run` prints what would be
    started and starts nothing; `detach` returns when the run has been started. `repeat` is the length of a chain of
    Slurm jobs, each of which goes on where the one before stopped at its time limit. Raises ConfigError with everything
    that is wrong with the recipe on that executor, UserError if the executor refuses.
    """
    member = prepare(settle(recipe))
    note_what_was_fitted([member])
    recipe, built = member.recipe, member.built
    if size := os.environ.get("WORLD_SIZE"):  # under torchrun already, started by hand
        require(built, int(size))
        return processes.run_here(recipe, built)
    watching.refuse_under_way(member.folder)
    if executor is None or isinstance(executor, Local | Docker | Slurm):
        where = executor or Local()
    else:
        from recipes import foreign

        where = foreign.ours(executor)
        if where is None:
            require(built, foreign.processes(executor))
            return foreign.run(recipe, built, executor, detach=detach, dry_run=dry_run)
    if problems := absent(built, where, dry_run=dry_run):
        raise ConfigError(problems)
    if isinstance(where, Slurm):
        job = submit([member], built.name, where, repeat=repeat, dry_run=dry_run)
        if job is None:
            return 0
        record = records.read(member.folder)
        assert record
        jobs = "job" if len(record.ids) == 1 else "jobs"
        print(f"{record.name} is sent as {jobs} {', '.join(record.ids)}", flush=True)
        return 0 if detach else until_interrupted(member.folder, watching.follow)
    if repeat > 1:
        raise ConfigError(Problem("--repeat", "chains jobs of a Slurm cluster; here, a run takes the time it takes"))
    count = where.processes(smallest_world(built))
    require(built, count)
    if isinstance(where, Local):
        if not dry_run and (done := _finished(built, member.folder)):
            print(done)
            return 0
        from hybrid.training import trackers

        trackers.require(built)
        require_memory([built], where, dry_run=dry_run)
    if dry_run:
        print(f"note: what this reads is written into {member.folder} by a start; now nothing is", file=sys.stderr)
    start = containers.launch if isinstance(where, Docker) else processes.launch
    return start(recipe, built, where, count, detach=detach, dry_run=dry_run)  # pyright: ignore[reportArgumentType]


def absent(built: Settings, where: Executor, *, dry_run: bool) -> list[Problem]:
    """What is wrong with the files that a run reads and leaves behind, where this machine sees those that the run will:
    not over SSH, and in a container not in folders that only that has. A dry run of made-up data tries out a layout,
    and needs no file of a tokenizer.
    """
    from hybrid.data import presence

    if isinstance(where, Slurm) and where.ssh:
        return []
    problems = [*presence.absent(built.data), *weights.check(built)]
    tries_out = dry_run and built.data.source == "mock"
    # With a checkpoint, the tokenizer is in that, too.
    if not tries_out and not latest_step(Path(built.folder) / built.name / CHECKPOINTS):
        problems += presence.tokenizer_absent(built.data)
    if isinstance(where, Docker):
        problems = [problem for problem in problems if containers.shares(where, built, _value(built, problem.place))]
    return problems


def _value(built: Settings, place: str) -> str:
    """What a field of the settings is, as text."""
    section, _, name = place.partition(".")
    return str(getattr(getattr(built, section, None), name, ""))


def _finished(built: Settings, run: Path) -> str:
    """What is said of a run that has nothing left to do, which is thus known before torch is loaded; else ''."""
    step = latest_step(run / CHECKPOINTS)
    done = finished(built, step)
    if not done or step is None or built.checkpoint.export or watching.state(run).status != "finished":
        return ""
    return "" if checksums.damage(checkpoint_folder(run / CHECKPOINTS, step)) else done


def require_memory(runs: Sequence[Settings], where: Local, *, dry_run: bool) -> None:
    """Raise ConfigError for runs that do not fit into this machine's memory; a dry run only notes it."""
    problems = [
        problem for built in runs for problem in host_memory.too_large(built, where.processes(smallest_world(built)))
    ]
    if problems and not dry_run:
        raise ConfigError(dict.fromkeys(problems))
    for problem in dict.fromkeys(problems):
        print(f"note: {problem}", file=sys.stderr)


def prepare(recipe: "fdl.Partial[Any]") -> Member:
    """The run that a settled recipe means.

    Raises ConfigError for what is wrong with it on any executor, also that its folder holds another run, and within a
    job: what a job's own code launches would be launched by each of its processes, and again by those it starts.
    """
    if "HYBRID_JOB" in os.environ:
        raise ConfigError("this is a job that was launched already; put the call of launch under a main guard")
    built = settings(recipe)
    try:
        refuse_other_run(built)
    except ConfigError as error:  # it may differ by a mistake, which is then what is to be said first
        raise ConfigError([*check(built), *error.problems]) from None
    if (Path(built.folder) / built.name / records.SWEEP_FILE).is_file():
        message = (
            f"'{built.name}' is what a sweep is called, whose table would hide this run; name it otherwise (name=...)"
        )
        raise ConfigError(Problem("name", message))
    return Member(recipe, built)


def note_what_was_fitted(members: Sequence[Member]) -> None:
    """Say, once for all of these runs, what was made to fit their length."""
    for note in dict.fromkeys(fitted(member.recipe) for member in members):
        if note:
            print(f"note: {note}", file=sys.stderr)


def until_interrupted(folder: Path, follow: Callable[[Path], int]) -> int:
    """Follow a job; Ctrl-C ends that and not the job."""
    try:
        return follow(folder)
    except KeyboardInterrupt:
        name = folder.name
        hint = f"{name} goes on; `hybrid logs -f {name}` shows it again, `hybrid cancel {name}` ends it"
        print(f"\n{hint}", file=sys.stderr)
        return 130
