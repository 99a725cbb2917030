"""nemo-run's own executor objects, given in Python or by a profile. Importing this imports nemo-run.

A Slurm or local executor is taken as ours of the same values, so what is said of those holds for it: exit codes, logs,
quoting, status, requeueing. Any other runs through nemo-run's experiments as nemo-run has it; what is added is that the
exit code says whether it failed.
"""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.config import Settings
from hybrid.errors import ConfigError, Problem, UserError
from recipes import weights
from recipes.executors import Executor, Local, Slurm
from recipes.nemo import to_nemo_run
from recipes.sending import nemo_run  # which imports it without torch

if TYPE_CHECKING:
    import fiddle as fdl

# Fields of nemo_run.SlurmExecutor by ours.
_SLURM = {
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "constraint": "constraint",
    "nodes": "nodes",
    "time": "time",
    "memory": "mem",
    "container": "container_image",
    "mounts": "container_mounts",
    "env": "env_vars",
}
# Fields that sbatch takes as they are.
_SBATCH = ("comment", "exclude", "gres", "segment", "network", "mem_per_gpu", "mem_per_cpu", "gpus_per_task")
# Fields that are met otherwise, or mean nothing here.
_MET = (
    "srun_args",
    "setup_lines",
    "additional_parameters",
    "ntasks_per_node",
    "gpus_per_node",
    "torchrun_nproc_per_node",
    "cpus_per_task",
    "exclusive",
    "signal",
    "retries",
    "tunnel",
    "launcher",
    "packager",
    "job_name_prefix",
    "job_details",
    "job_dir",
    "experiment_id",
    "open_mode",
    "container_env",
    "dependency_type",
    "poll_estimated_start_time",
    "wait_time_for_group_job",
    "monitor_group_job",
    "monitor_group_job_wait_time",
    "ray_template",
)


def ours(executor: Any) -> Executor | None:
    """Return the executor of ours that means the same; None if there is none.

    Raises ConfigError for fields of a Slurm executor that have no counterpart.
    """
    if isinstance(executor, nemo_run.SlurmExecutor):
        return _slurm(executor)
    if isinstance(executor, nemo_run.LocalExecutor) and executor.nodes == 1:
        return Local(devices=executor.nproc_per_node(), env=dict(executor.env_vars))
    return None


def run(recipe: "fdl.Partial[Any]", built: Settings, executor: Any, *, detach: bool, dry_run: bool) -> int:
    """Run a recipe on one of nemo-run's executors through an experiment of nemo-run's; returns the exit code.

    What it runs on must have this package installed: nothing but the recipe is sent. Weights of another format are
    converted here. Raises ConfigError for an export, which only a process of ours writes; UserError if nemo-run cannot
    start it.
    """
    if built.checkpoint.export:
        message = "is only written by runs on this machine, in a container or on Slurm; `hybrid convert` does it later"
        raise ConfigError(Problem("checkpoint.export", message))
    if not dry_run and built.checkpoint.load and Path(weights.path_of(built.checkpoint.load)).exists():
        recipe = weights.localize(recipe, built)
    if executor.nnodes() * executor.nproc_per_node() > 1 and executor.launcher is None:
        executor.launcher = "torchrun"
    try:
        with nemo_run.Experiment(built.name, executor, enable_goodbye_message=False) as experiment:
            experiment.add(to_nemo_run(recipe), executor, name=built.name, tail_logs=not detach)
            if dry_run:
                experiment.dryrun()
                return 0
            experiment.run(detach=detach)
            job = experiment.jobs[0]
    except (Exception, SystemExit) as error:  # whatever the client of a cloud or of docker raises
        raise UserError(f"nemo-run's {type(executor).__name__} did not start the run: {error}") from error
    if detach:
        print(f"{built.name} is sent as {job.handle}; `nemo experiment status {experiment._id}` says how it stands")
        return 0
    return 0 if job.state.name == "SUCCEEDED" else 1


def processes(executor: Any) -> int:
    """Processes of a run on one of nemo-run's executors."""
    return executor.nnodes() * executor.nproc_per_node()


def _slurm(executor: Any) -> Slurm:
    taken = {*_SLURM.values(), *_SBATCH, *_MET}
    problems = [
        Problem(f"executor.{field.name}", f"is {getattr(executor, field.name)!r}, which has no place here")
        for field in fields(executor)
        if field.init and field.name not in taken and getattr(executor, field.name) != _default(field)
    ]
    problems += [
        Problem(f"executor.{name}", f"is {value!r}; groups of different nodes have no place here")
        for name in ("nodes", "ntasks_per_node")
        if not isinstance(value := getattr(executor, name), int)
    ]
    if problems:
        raise ConfigError(problems)
    sbatch = {name.replace("_", "-"): str(value) for name in _SBATCH if (value := getattr(executor, name)) is not None}
    for name, value in (executor.additional_parameters or {}).items():
        sbatch[name.replace("_", "-")] = "" if value is True else str(value)
    if isinstance(executor.exclusive, str):
        sbatch["exclusive"] = executor.exclusive
    same: dict[str, Any] = {mine: getattr(executor, theirs) for mine, theirs in _SLURM.items()}
    devices = executor.nproc_per_node()
    cores = (executor.cpus_per_task or 0) * executor.ntasks_per_node  # of a node
    return Slurm(
        **same,
        **_tunnel(executor.tunnel),
        devices=devices,
        gpu_request="gpus_per_node" if executor.gpus_per_node else "none",
        cpus=-(-cores // devices) or None,
        exclusive=executor.exclusive is True,
        warning=_warning(executor.signal),
        requeues=executor.retries or Slurm().requeues,
        setup=str(executor.setup_lines or "").splitlines(),
        sbatch=sbatch,
        srun=list(executor.srun_args or []),
    )


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _warning(signal: str | None) -> int:
    """The seconds of sbatch's --signal=SIGNAL@SECONDS."""
    _, _, text = (signal or "").partition("@")
    return int(text) if text.isdigit() else Slurm().warning


def _tunnel(tunnel: Any) -> dict[str, Any]:
    if not isinstance(tunnel, nemo_run.SSHTunnel):
        return {}
    port = f":{tunnel.port}" if tunnel.port else ""
    return {
        "ssh": f"{tunnel.user}@{tunnel.host}{port}",
        "identity": tunnel.identity,
        "folder": tunnel.job_dir or None,
    }
