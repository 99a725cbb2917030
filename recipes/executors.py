"""Where a recipe runs: what an executor says, without anything that runs.

`launch(recipe, slurm(account="research", nodes=4))` in Python, `--executor slurm executor.nodes=4` on the command line,
or a profile of one's own by name (see `profiles`). Every field carries its meaning and, where it is no plain count, its
unit.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hybrid.config import option

GpuRequest = Literal["gpus_per_node", "gres", "none"]

# sbatch(1), --time: what may stand between days, hours, minutes and seconds.
_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<day_hours>\d+)(?::(?P<day_minutes>\d+)(?::(?P<day_seconds>\d+))?)?)"
    r"|(?:(?P<hours>\d+):(?P<hour_minutes>\d+):(?P<hour_seconds>\d+))"
    r"|(?:(?P<minutes>\d+)(?::(?P<seconds>\d+))?)"
)


@dataclass(kw_only=True)
class Local:
    """This machine: in this process when one is enough, else as many processes under torchrun."""

    devices: int | None = option(None, "processes, one a GPU; None: every GPU here, or as many as the layout needs")
    env: dict[str, str] = option({}, "environment variables of the run")

    def processes(self, smallest: int) -> int:
        """Processes of a run whose layout takes at least `smallest`."""
        return self.devices or max(visible_gpus(), smallest, 1)


@dataclass(kw_only=True)
class Docker:
    """A container on this machine, started by docker or podman."""

    image: str = option("hybrid-recipes", "image; docs/docker.md says how it is built")
    devices: int | None = option(None, "processes, one a GPU; None: every GPU here, or as many as the layout needs")
    mounts: list[str] = option([], "folders the run needs, HOST:CONTAINER or one path for both; the run's own is added")
    env: dict[str, str] = option({}, "environment variables of the run")
    command: str = option("docker", "program that starts it: docker or podman")
    options: list[str] = option([], "further options of `docker run`, such as --shm-size=64g")
    python: str = option("python3", "interpreter in the image")

    def processes(self, smallest: int) -> int:
        """Processes of a run whose layout takes at least `smallest`."""
        return self.devices or max(visible_gpus(), smallest, 1)


@dataclass(kw_only=True)
class Slurm:
    """A Slurm cluster: this machine is a login node of it, or one is reached by SSH."""

    account: str | None = option(None, "account that is charged")
    partition: str | None = option(None, "partition; None: the cluster's default")
    qos: str | None = option(None, "quality of service")
    constraint: str | None = option(None, "features that the nodes must have, such as 'h100&ib'")
    nodes: int = option(1, "nodes")
    devices: int | None = option(None, "processes on a node, one a GPU; None: what the layout takes over the nodes")
    gpu_request: GpuRequest = option(
        "gpus_per_node", "how GPUs are asked for; none: not at all, for whole nodes and for CPUs"
    )
    gpu: str | None = option(None, "model of the GPUs, such as h100, for the estimate of the time; None: no estimate")
    cpus: int | None = option(None, "CPU cores for each process; None: the partition's default")
    memory: str | None = option(None, "memory of a node as sbatch takes it, such as 512G; None: the default")
    exclusive: bool = option(False, "take whole nodes")
    time: str = option("01:00:00", "time limit of one job as sbatch takes it, such as 2-12:00:00")
    warning: int = option(120, "time before the limit, or before preemption, at which the run saves", "seconds")
    requeues: int = option(10, "times a job is queued again after preemption, a node's failure or its time limit")
    parallel_jobs: int | None = option(None, "jobs of a sweep that may run at once; None: all of them")
    dependency: str | None = option(None, "jobs to wait for as sbatch takes them, such as afterok:1234")
    sbatch: dict[str, str] = option({}, "further sbatch options by their long names; an empty text for a bare flag")
    srun: list[str] = option([], "further options of srun, each one as it is")
    env: dict[str, str] = option({}, "environment variables of the run")
    setup: list[str] = option([], "lines of bash before the run, such as 'module load cuda/13.0'")
    container: str | None = option(
        None, "image as pyxis takes it, a .sqsh file or a registry's name; None: no container"
    )
    mounts: list[str] = option([], "folders that the container sees, HOST:CONTAINER or one path for both")
    python: str | None = option(None, "interpreter of the job; None: the one in use here, python3 elsewhere")
    ssh: str | None = option(None, "login node as [USER@]HOST[:PORT]; None: this machine is one")
    identity: str | None = option(None, "file of the private key for SSH; None: what SSH finds itself")
    folder: str | None = option(None, "folder on the cluster where the job starts (with ssh); None: the home folder")

    def processes(self, smallest: int) -> int:
        """Processes of a run whose layout takes at least `smallest`."""
        return self.nodes * self.devices_per_node(smallest)

    def devices_per_node(self, smallest: int) -> int:
        """Processes on each node."""
        return self.devices or -(-max(smallest, 1) // max(self.nodes, 1))


type Executor = Local | Docker | Slurm

KINDS: dict[str, type[Local] | type[Docker] | type[Slurm]] = {"local": Local, "slurm": Slurm, "docker": Docker}


def local(devices: int | None = None, **fields: Any) -> Local:
    """Run on this machine, on `devices` GPUs or CPU processes."""
    return Local(devices=devices, **fields)


def slurm(account: str | None = None, **fields: Any) -> Slurm:
    """Run on a Slurm cluster; the fields are those of `Slurm`."""
    return Slurm(account=account, **fields)


def docker(image: str = "hybrid-recipes", **fields: Any) -> Docker:
    """Run in a container on this machine; the fields are those of `Docker`."""
    return Docker(image=image, **fields)


def mount_pairs(mounts: list[str]) -> list[str]:
    """A container's mounts as docker and pyxis take them: HOST:CONTAINER."""
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]


def visible_gpus() -> int:
    """NVIDIA GPUs that a process started here would see; asked of the system, since asking torch costs seconds."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() and name.strip() != "-1"])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def seconds(time: str) -> int | None:
    """Seconds of a time limit in sbatch's forms; None if it is in none of them, or has no end.

    The forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes,
    days-hours:minutes:seconds.
    """
    found = _TIME.fullmatch(time.strip())
    if not found:
        return None
    total = 0
    for name, text in found.groupdict(default="0").items():
        unit = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}[name.rpartition("_")[2]]
        total += int(text) * unit
    return total
