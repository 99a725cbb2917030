"""A run, a chain of jobs or a sweep on a Slurm cluster: checked, staged, sent, remembered."""

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hybrid.checks import check
from hybrid.config import Settings
from hybrid.costs.plan import smallest_world
from hybrid.errors import ConfigError, Problem, UserError
from recipes import cluster_checks, plugins, records, staging
from recipes.executors import Slurm
from recipes.records import Record
from recipes.slurm_script import SlurmJob

if TYPE_CHECKING:
    import fiddle as fdl


# What is wrong with these keeps the rest from being looked at.
_NEEDED = {"executor.nodes", "executor.devices", "executor.identity"}


@dataclass(frozen=True)
class Member:
    """One run of a submission: its settled recipe and the settings that it means."""

    recipe: "fdl.Partial[Any]"
    built: Settings

    @property
    def folder(self) -> Path:
        """The run's folder on this machine."""
        return Path(self.built.folder) / self.built.name


def submit(members: Sequence[Member], name: str, executor: Slurm, *, repeat: int, dry_run: bool) -> SlurmJob | None:
    """Send a run, or a sweep's runs as an array called `name`, and remember it; returns the submission.

    With `dry_run`, prints the sbatch scripts instead, says on stderr what the cluster lacks, and returns None. Raises
    ConfigError with all that is wrong with recipes, executor and cluster, UserError if Slurm or SSH refuses.
    """
    built = members[0].built
    problems = list(cluster_checks.values(executor))
    if _NEEDED.intersection(problem.place for problem in problems):
        raise ConfigError(problems)
    devices = executor.devices_per_node(smallest_world(built))
    for member in members:
        problems += check(member.built, executor.nodes * devices)
    try:
        around = plugins.arrange(replace(built, name=name))
        variables = [plugins.arrange(member.built).env | executor.env for member in members]
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if around.warning is not None:
        executor = replace(executor, warning=around.warning)
    run = PurePosixPath(built.folder) / name
    python = executor.python or ("python3" if executor.ssh else None)
    cluster = cluster_checks.look(executor, str(run), None if executor.container else python)
    job = SlurmJob(
        name=name,
        stamp=time.strftime("%Y%m%d-%H%M%S"),
        executor=executor,
        devices=devices,
        run=cluster.start / run,
        start=cluster.start,
        env=variables,
        prefix=tuple(around.prefix),
        folders=tuple(around.folders),
        repeats=repeat,
        local_python=sys.executable,
    )
    problems += cluster_checks.places(job, built)
    lacking = list(cluster_checks.found(cluster, job, built))
    if problems or (lacking and not dry_run):
        raise ConfigError(_once([*problems, *lacking]))
    for doubt in [str(problem) for problem in lacking] + list(
        cluster_checks.doubts(cluster, job, built, repeat if repeat > 1 else 1 + executor.requeues)
    ):
        print(f"note: {doubt}", file=sys.stderr)
    if dry_run:
        _print(job)
        return None
    _send(job, members)
    return job


def _once(problems: list[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))


def _print(job: SlurmJob) -> None:
    from recipes import sending

    for number, task in enumerate(job.tasks):
        if number:
            print(f"# sent with --dependency=afterany and the id of the job before, {job.tasks[number - 1]}")
        print(sending.script(job, task), end="\n\n" if number + 1 < len(job.tasks) else "\n")


def _send(job: SlurmJob, members: Sequence[Member]) -> None:
    executor = job.executor
    here = members[0].folder.parent / job.name
    with tempfile.TemporaryDirectory(prefix="hybrid-") as name:
        staged = Path(name)
        staging.stage(staged, [member.recipe for member in members])
        script = f"mkdir -p {job.logs} 2>&1"
        if said := records.shell(script, executor.ssh, executor.identity).decode(errors="replace").strip():
            raise UserError(said)
        from recipes import sending

        try:
            ids = sending.send(job, staged, here.absolute() / job.base.name)
        except OSError as error:
            _clear(job, here)
            raise UserError(f"{here}: the job's files cannot be written: {staging.reason(error)}") from None
        except UserError:
            _clear(job, here)
            raise
    for member in members:
        staging.write_recipe(member.recipe, member.folder)
    remember = {"kind": "slurm", "sent": time.strftime("%FT%T%z"), "ssh": executor.ssh, "identity": executor.identity}
    if job.recipes == 1:
        log = f"{records.LOGS}/{job.name}_%j.out"
        records.write(Record(**remember, name=job.name, run=str(job.run), ids=ids, log=log), here)
        return
    for number, member in enumerate(members, start=1):
        run = job.start / member.built.folder / member.built.name
        records.write(
            Record(
                **remember,
                name=member.built.name,
                run=str(run),
                ids=[f"{ids[0]}_{number}"],
                log=f"{job.logs}/{job.name}_%j.out",
                ended=f"{job.logs}/exit_%j",
            ),
            member.folder,
        )


def _clear(job: SlurmJob, here: Path) -> None:
    """Remove what was written for a job that was not sent, and the folders that were made for it, here and there."""
    sent = f"{job.base.name}/experiments/{job.name}/{job.experiment}"
    shutil.rmtree(here / sent, ignore_errors=True)
    for folder in (*(here / sent).parents[:3], here):  # with SSH, they are others than the cluster's
        with contextlib.suppress(OSError):
            folder.rmdir()
    empty = " ".join(f"{job.run}/{folder}" for folder in (Path(sent).parent, f"{job.base.name}/experiments"))
    script = f"rm -rf {job.run}/{sent}; rmdir {empty} {job.base} {job.logs} {job.run} 2>/dev/null; true"
    records.shell(script, job.executor.ssh, job.executor.identity)
