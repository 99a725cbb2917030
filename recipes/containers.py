"""A run in a container on this machine, started by docker or podman.

The container sees the folder that this is started from, the folder of the runs and the data cache under their own
names, and runs as the user who starts it. It takes the code from here, so that the image need not be built anew for
each change of it.
"""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.config import Settings
from hybrid.data.cache import cache_folder
from hybrid.errors import ConfigError, Problem, UserError
from hybrid.training.folder import writable
from recipes import plugins, records, staging, watching
from recipes.executors import Docker, mount_pairs, visible_gpus
from recipes.records import Record
from recipes.registry import RECIPE_FILE

if TYPE_CHECKING:
    import fiddle as fdl


def launch(
    recipe: "fdl.Partial[Any]", built: Settings, executor: Docker, count: int, *, detach: bool, dry_run: bool
) -> int:
    """Run a recipe in a container of `count` processes; returns the exit code, 0 with `detach`.

    Raises ConfigError for values of the executor that cannot be, UserError in docker's own words.
    """
    if problems := list(_problems(executor)):
        raise ConfigError(problems)
    run = (Path(built.folder) / built.name).absolute()
    around = plugins.arrange(built)
    variables = around.env | executor.env
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"hybrid-{re.sub(r'[^A-Za-z0-9_.-]', '-', built.name)}-{stamp}"
    staged = run / "jobs" / stamp
    command = _command(built, executor, count, run, staged, name, around.prefix, variables)
    if dry_run:
        print(" ".join([*(f"{key}={shlex.quote(value)}" for key, value in variables.items()), shlex.join(command)]))
        return 0
    _require_image(executor)
    with writable(run):
        staged.mkdir(parents=True)
        for folder in (run / records.LOGS, *(run / folder for folder in around.folders), cache_folder(built.data)):
            folder.mkdir(parents=True, exist_ok=True)
    staging.stage(staged, [recipe])
    staging.write_recipe(recipe, run)
    started = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if started.returncode:
        subprocess.run([executor.command, "rm", "--force", name], capture_output=True)
        raise UserError(f"the container did not start: {'; '.join(started.stderr.strip().splitlines())}")
    sent = time.strftime("%FT%T%z")
    record = Record(kind="docker", name=built.name, run=str(run), sent=sent, ids=[name], command=executor.command)
    records.write(record, run)
    print(f"{built.name} is started as container {name}", flush=True)
    return 0 if detach else _until_ended(executor, run, name)


def _until_ended(executor: Docker, run: Path, name: str) -> int:
    """Follow a container; Ctrl-C asks the run to save and stop, as it does without one."""
    while True:
        try:
            return watching.follow(run)
        except KeyboardInterrupt:
            subprocess.run([executor.command, "kill", "--signal=INT", name], capture_output=True)


def _command(
    built: Settings,
    executor: Docker,
    count: int,
    run: Path,
    staged: Path,
    name: str,
    prefix: list[str],
    variables: Mapping[str, str],
) -> list[str]:
    here, cache = Path.cwd(), cache_folder(built.data).absolute()
    mounts = [f"{folder}:{folder}" for folder in _own_folders(built)] + mount_pairs(executor.mounts)
    podman = Path(executor.command).name == "podman"
    own = {"HOME": "/tmp", "PYTHONPATH": f"{staged}/code", "PYTHONSAFEPATH": "1", "XDG_CACHE_HOME": str(cache.parent)}
    # One thread a process is torchrun's own default; share the cores out instead.
    own["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    words = [executor.command, "run", "--detach", f"--name={name}", "--init", "--ipc=host", f"--workdir={here}"]
    # Files of the run belong to the user who started it.
    words += ["--userns=keep-id"] if podman and os.geteuid() else [f"--user={os.geteuid()}:{os.getegid()}"]
    if visible_gpus():
        words += ["--device=nvidia.com/gpu=all"] if podman else ["--gpus", str(executor.devices or "all")]
    words += [f"--volume={mount}" for mount in mounts]
    words += [f"--env={key}={value}" for key, value in own.items() if key not in variables]
    words += [f"--env={key}" for key in variables]  # with the value that the command itself is started with
    program, *rest = [*prefix, executor.python, "-u"]
    # Whatever the image starts by itself, which is `hybrid` in ours, is not what is wanted.
    words += [f"--entrypoint={program}", *executor.options, executor.image, *rest]
    if count > 1:
        words += ["-m", "recipes.torchrun", str(staged / "ranks"), "--standalone", "--nproc-per-node", str(count)]
    return [*words, "-m", "recipes.worker", str(staged / RECIPE_FILE)]


def shares(executor: Docker, built: Settings, value: str) -> bool:
    """Whether a path is the same in the container and here; a relative one is. (A blend of several counts as one.)"""
    mounts = [pair.split(":")[:2] for pair in mount_pairs(executor.mounts)]
    own = [*_own_folders(built), *(here for here, there in mounts if here == there)]
    path = Path(value)
    return not path.is_absolute() or any(path.is_relative_to(folder) for folder in own)


def _own_folders(built: Settings) -> list[str]:
    """Folders that a container gets besides those of `executor.mounts`."""
    run, cache = Path(built.folder).absolute(), cache_folder(built.data).absolute()
    return list(dict.fromkeys(str(folder) for folder in (Path.cwd(), run, cache)))


def _problems(executor: Docker) -> list[Problem]:
    problems = []
    if not shutil.which(executor.command):
        message = f"'{executor.command}' is not installed here; docker and podman will do"
        problems.append(Problem("executor.command", message))
    for mount in executor.mounts:
        host = mount.split(":")[0]
        if not host.startswith("/"):
            problems.append(Problem("executor.mounts", f"'{mount}' is not HOST:CONTAINER with paths that begin with /"))
        elif not Path(host).exists():
            problems.append(Problem("executor.mounts", f"there is no '{host}' here"))
    return problems


def _require_image(executor: Docker) -> None:
    """Raise ConfigError if the image is not here, or nobody answers who would know, with what there is to do."""
    inspected = subprocess.run(
        [executor.command, "image", "inspect", "--format", "{{.Id}}", executor.image], capture_output=True, text=True
    )
    if inspected.returncode:
        program = executor.command
        said = (inspected.stderr.strip().splitlines() or ["no answer"])[-1].rstrip(".")
        if subprocess.run([program, "info"], capture_output=True).returncode:
            message = f"'{program}' does not answer ({said}); start its daemon, or see that you may talk to it"
            raise ConfigError(Problem("executor.command", message))
        way_out = f"docs/docker.md says how it is built, `{program} pull` fetches one"
        raise ConfigError(Problem("executor.image", f"there is no image '{executor.image}' here ({said}); {way_out}"))
