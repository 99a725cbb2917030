"""What can be wrong with a submission, found before it is sent: the executor's values, and the cluster as it is."""

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from hybrid.config import Settings
from hybrid.costs import parameters
from hybrid.costs.hardware import GPUS
from hybrid.costs.plan import evaluate
from hybrid.errors import Problem, nearest
from recipes import slurm_script, weights
from recipes.executors import Slurm, seconds
from recipes.records import shell

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NAME = re.compile(r"[A-Za-z0-9_.,=+@-]+")
# Bytes of a parameter in a checkpoint: weights, and the optimizer's float32 copy and two moments.
_CHECKPOINT_BYTES = {"fp32": 4 + 12, "bf16": 2 + 12}
_WANTED = ("torch", "megatron.core", "fiddle")  # in the interpreter of the job


@dataclass(frozen=True)
class Cluster:
    """What the machine that jobs are sent from says of itself."""

    start: PurePosixPath  # folder where the job starts
    has_sbatch: bool
    missing: frozenset[str]  # of the paths that were asked for
    writable: bool
    free_bytes: int
    lacks: tuple[str, ...]  # packages that the job's interpreter does not find


def look(executor: Slurm, run: str, python: str | None) -> Cluster:
    """Ask a cluster all there is to ask, at once; `run` is the run's folder, `python` what is to be tried.

    Raises UserError if SSH fails.
    """
    paths = _host_paths(executor)
    script = [
        f"cd {shlex.quote(executor.folder)} 2>/dev/null || echo 'missing {executor.folder}'" if executor.folder else "",
        'echo "start $PWD"',
        "command -v sbatch >/dev/null && echo sbatch",
        *(f"[ -e {shlex.quote(path)} ] || echo {shlex.quote(f'missing {path}')}" for path in paths),
        f"there={shlex.quote(run)}",
        'while [ ! -e "$there" ]; do there=$(dirname "$there"); done',
        '[ -w "$there" ] && echo writable',
        """echo "free $(df -Pk "$there" | awk 'END { print $4 }')" """,
    ]
    if python:
        program = (
            f"import importlib.util as u; print('lacks', *[m for m in {_WANTED!r} if not u.find_spec(m.split('.')[0])])"
        )
        script.append(f"{shlex.quote(python)} -c {shlex.quote(program)} 2>/dev/null || echo lacks python")
    answer = shell("\n".join(script), executor.ssh, executor.identity).decode(errors="replace")
    said: dict[str, list[str]] = {}
    for line in answer.splitlines():
        key, _, rest = line.partition(" ")
        said.setdefault(key, []).append(rest)
    return Cluster(
        start=PurePosixPath(said["start"][0]),
        has_sbatch="sbatch" in said,
        missing=frozenset(said.get("missing", [])),
        writable="writable" in said,
        free_bytes=int(said.get("free", ["0"])[0] or 0) * 1024,
        lacks=tuple(said.get("lacks", [""])[0].split()),
    )


def values(executor: Slurm) -> Iterator[Problem]:
    """What is wrong with the executor's own values."""
    least = {"nodes": 1, "devices": 1, "cpus": 1, "warning": 0, "requeues": 0, "parallel_jobs": 1}
    for name, bound in least.items():
        value = getattr(executor, name)
        if value is not None and value < bound:
            yield Problem(f"executor.{name}", f"is {value}, but must be at least {bound}")
    limit = seconds(executor.time)
    if limit is None:
        yield Problem("executor.time", f"'{executor.time}' is no time limit; write for example 04:00:00 or 2-12:00:00")
    elif 0 < limit <= executor.warning:
        yield Problem(
            "executor.warning",
            f"is {executor.warning} seconds, but the time limit is {executor.time}; give it more time",
        )
    for name in executor.env:
        if not _VARIABLE.fullmatch(name):
            yield Problem("executor.env", f"'{name}' is no name of an environment variable")
    for name, value in executor.env.items():
        if "\0" in value:
            yield Problem("executor.env", f"{name} holds a zero byte, which no environment variable can")
    for name in executor.sbatch:
        if name.startswith("-"):
            yield Problem("executor.sbatch", f"'{name}' is to be written without dashes: {name.lstrip('-')}")
    if executor.gpu is not None and executor.gpu not in GPUS:
        message = f"'{executor.gpu}' is unknown{nearest(executor.gpu, GPUS)}"
        yield Problem("executor.gpu", message, f"GPUs with figures: {', '.join(GPUS)}")
    if executor.folder and not executor.ssh:
        yield Problem("executor.folder", "is for a cluster reached by SSH; here, change into the folder instead")
    if executor.identity and not os.path.isfile(os.path.expanduser(executor.identity)):
        yield Problem("executor.identity", f"there is no file '{executor.identity}' on this machine")
    if executor.mounts and not executor.container:
        yield Problem("executor.mounts", "are of a container, and executor.container names none")
    for mount in executor.mounts:
        if not all(part.startswith("/") for part in mount.split(":")[:2]):
            yield Problem("executor.mounts", f"'{mount}' is not HOST:CONTAINER with paths that begin with /")


def places(job: slurm_script.SlurmJob, built: Settings) -> Iterator[Problem]:
    """What of the run the job would not find: its folder, its files in a container."""
    path = str(job.run)
    if not _NAME.fullmatch(built.name):
        yield Problem("name", f"is {built.name!r}, but a Slurm job's can have letters, digits and _.,=+@- alone")
    elif shlex.quote(path) != path or "%" in path:
        yield Problem(
            "folder",
            f"the run would be in '{path}', but the path of a Slurm job can have letters, digits and _-./ alone",
        )
    elif slurm_script.CONTAINER_FOLDER in path:
        name = slurm_script.CONTAINER_FOLDER
        yield Problem("folder", f"the run would be in '{path}', but nemo-run keeps the name '{name}' to itself")
    if not job.executor.container:
        return
    named = {"folder": built.folder, "checkpoint.load": weights.path_of(built.checkpoint.load or "")}
    if built.data.source == "text" and built.data.path:
        named["data.path"] = built.data.path
    for place, value in named.items():
        if not value:
            continue
        seen = slurm_script.inside(job.start / value, job.executor)
        # A relative path is found from the folder where the job starts, whatever that is called in the container.
        if seen is None or (value.startswith("/") and str(seen) != value):
            full = job.start / value
            yield Problem(place, f"'{full}' is in none of the container's mounts; add executor.mounts+=['{full}']")


def found(cluster: Cluster, job: slurm_script.SlurmJob, built: Settings) -> Iterator[Problem]:
    """What the cluster lacks."""
    executor = job.executor
    where = executor.ssh or "this machine"
    if not cluster.has_sbatch:
        hint = "" if executor.ssh else "; if the cluster is reached by SSH, set executor.ssh=HOST"
        yield Problem("executor", f"{where} has no sbatch, so it is no login node of a Slurm cluster{hint}")
    for mount in executor.mounts:
        if mount.split(":")[0] in cluster.missing:
            yield Problem("executor.mounts", f"there is no '{mount.split(':')[0]}' on {where}")
    if executor.container in cluster.missing:
        yield Problem("executor.container", f"there is no image '{executor.container}' on {where}")
    if executor.folder in cluster.missing:
        yield Problem("executor.folder", f"there is no folder '{executor.folder}' on {where}")
    if cluster.lacks:
        what = "cannot be run" if "python" in cluster.lacks else f"lacks {', '.join(cluster.lacks)}"
        yield Problem(
            "executor.python", f"'{job.python}' on {where} {what}; set it to the interpreter with the packages"
        )
    if not cluster.writable:
        yield Problem("folder", f"'{job.run}' on {where} cannot be written")
    size = checkpoint_bytes(built)
    if cluster.free_bytes < size:
        yield Problem(
            "folder",
            f"'{job.run}' on {where} has {_size(cluster.free_bytes)} free, less than one checkpoint, {_size(size)}",
        )


def doubts(cluster: Cluster, job: slurm_script.SlurmJob, built: Settings, jobs: int) -> Iterator[str]:
    """What may go wrong, a sentence each: time and disk. `jobs` is how often the time limit may pass."""
    executor = job.executor
    size = checkpoint_bytes(built)
    kept = built.checkpoint.keep_last or -(-built.trainer.steps // built.checkpoint.save_interval)
    if size <= cluster.free_bytes < size * (kept + 1):
        yield (
            f"'{job.run}' has {_size(cluster.free_bytes)} free, and {kept} checkpoints and one being written take "
            f"{_size(size * (kept + 1))}; lower checkpoint.keep_last or make room"
        )
    limit = seconds(executor.time)
    if executor.gpu and limit:
        planned = evaluate(built, GPUS[executor.gpu], executor.nodes * job.devices)
        if planned.seconds > limit * jobs:
            yield (
                f"the run is planned to take {planned.seconds / 3600:.1f} hours, and {jobs} x {executor.time} are "
                f"{limit * jobs / 3600:.1f}; raise executor.time, executor.requeues or --repeat"
            )


def checkpoint_bytes(built: Settings) -> int:
    """Bytes of one checkpoint, about: weights and optimizer."""
    per_parameter = _CHECKPOINT_BYTES.get(built.trainer.precision, _CHECKPOINT_BYTES["bf16"])
    return parameters.whole(built).total * per_parameter


def _host_paths(executor: Slurm) -> list[str]:
    paths = [mount.split(":")[0] for mount in executor.mounts]
    image = executor.container or ""
    return [*paths, image] if image.startswith(("/", "./", "../")) or image.endswith(".sqsh") else paths


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count > 2**27 else f"{count / 2**20:.1f} MiB"
