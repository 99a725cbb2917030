"""Sending a job to Slurm through nemo-run. Importing this imports nemo-run; nothing but a launch does.

nemo-run 0.11's defects that concern the script are met in `slurm_script`; here are those of its objects:

- its job names repeat the account: `Details` names the job;
- its Slurm executor overwrites what `--output` of srun and sbatch say: `Details` keeps one log a job;
- `LocalTunnel` looks for scripts where they were not written unless its folder is the experiments' own;
- `GitArchivePackager` leaves out what is not committed: `Staged` copies the code that is running;
- it says why sbatch refused a job in a log line, and ends the process when SSH refuses: both are errors here;
- it prints that it connects among what the command prints, and takes the ~ of a key's path for a folder.
"""

import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError, Problem, UserError
from recipes import slurm_script
from recipes.executors import mount_pairs
from recipes.slurm_script import SlurmJob


@contextmanager
def _quickly() -> Any:
    """Leave out torch, half of nemo-run's import: it is there to write torch's dtypes as YAML, which no recipe holds.

    What its other imports deprecate among themselves is left out, too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "torch" in sys.modules:
            yield
            return
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]: Python's mark of a module not to be found
        try:
            yield
        finally:
            sys.modules.pop("torch")


with _quickly():
    import nemo_run
    from invoke.exceptions import UnexpectedExit
    from nemo_run.core.execution.slurm import SlurmBatchRequest, SlurmJobDetails
    from nemo_run.core.frontend.console.api import CONSOLE


@dataclass(kw_only=True)
class Details(SlurmJobDetails):
    """Names of a job and of its files; what srun's tasks write comes with what the script writes."""

    @property
    def stdout(self) -> Path:
        """sbatch's --output; %j is the job."""
        return Path(str(self.folder)) / f"{self.job_name}_%j.out"

    @property
    def srun_stdout(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """srun's --output."""
        return "all"


@dataclass(kw_only=True)
class Staged(nemo_run.Packager):
    """Sends a folder that has been prepared: code, recipes, versions."""

    folder: str = ""

    def package(self, path: Path, job_dir: str, name: str) -> str:
        """Copy the folder into the job's; there is nothing left to unpack."""
        shutil.copytree(self.folder, job_dir, dirs_exist_ok=True)
        return ""


def script(job: SlurmJob, task: str) -> str:
    """The sbatch script of one job, as `send` sends it."""
    executor = _executor(job, task, "")
    folder = job.base / "experiments" / job.name / job.experiment
    executor.assign(job.experiment, str(folder), task, task)
    return SlurmBatchRequest(
        launch_cmd=["sbatch", "--requeue", "--parsable"],
        jobs=[task],
        command_groups=[[" ".join(slurm_script.command(job, task))]],
        executor=executor,
        max_retries=0,
        extra_env={},
        launcher=executor.get_launcher(),
    ).materialize()


def send(job: SlurmJob, staged: Path, local_base: Path) -> list[str]:
    """Submit the jobs; returns Slurm's ids of them. Raises ConfigError in sbatch's own words, UserError if SSH refuses.

    `staged` holds what is to be in each job's folder, `local_base` is where nemo-run keeps its part here: the same as
    `job.base` without SSH.
    """
    first = _executor(job, job.tasks[0], str(staged))
    quiet, CONSOLE.quiet = CONSOLE.quiet, True
    try:
        with nemo_run.Experiment(
            job.name,
            first,
            id=job.experiment,
            log_level="CRITICAL",
            base_dir=str(local_base),
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
            serialize_metadata_for_scripts=False,
        ) as experiment:
            for task in job.tasks:
                program, *words = slurm_script.command(job, task)
                experiment.add(
                    nemo_run.Script(path=words[0], args=words[1:], entrypoint=program),
                    _executor(job, task, str(staged)),
                    name=task,
                )
            experiment.run(sequential=job.repeats > 1, detach=True)
            # sbatch --parsable: JOB, or JOB;CLUSTER on federated clusters
            return [sent.handle.split("/")[3].partition(";")[0] for sent in experiment.jobs]
    except UnexpectedExit as error:
        said = [line for line in (error.result.stderr + error.result.stdout).splitlines() if line.strip()]
        where, words = job.executor.ssh or "this machine", "; ".join(said[-5:])
        message = f"the job was not sent ({words}); `sinfo` says what Slurm on {where} has, or that it does not answer"
        raise ConfigError(Problem("executor", message)) from None
    except SystemExit:
        raise UserError(f"{job.executor.ssh}: SSH refused; no job was sent") from None
    finally:
        CONSOLE.quiet = quiet


def _executor(job: SlurmJob, task: str, staged: str) -> nemo_run.SlurmExecutor:
    executor = job.executor
    gpus: dict[str, Any] = {}
    if executor.gpu_request == "gpus_per_node":
        gpus["gpus_per_node"] = job.devices
    elif executor.gpu_request == "gres":
        gpus["gres"] = f"gpu:{job.devices}"
    return nemo_run.SlurmExecutor(
        account=executor.account,  # pyright: ignore[reportArgumentType]: None leaves the option out
        partition=executor.partition,
        job_name_prefix=job.name,  # not used, but without it the account is taken apart
        time=executor.time,
        nodes=executor.nodes,
        ntasks_per_node=1,
        cpus_per_task=executor.cpus * job.devices if executor.cpus else None,
        qos=executor.qos,
        mem=executor.memory,
        constraint=executor.constraint,
        exclusive=executor.exclusive or None,
        array=_array(job),
        container_image=slurm_script.quote(executor.container) if executor.container else None,
        container_mounts=[slurm_script.quote(mount) for mount in mount_pairs(executor.mounts)],
        container_env=_names(job) if executor.container else None,
        additional_parameters=slurm_script.sbatch_options(job),
        srun_args=slurm_script.srun_options(job),
        setup_lines=slurm_script.setup(job, task),
        job_details=Details(job_name=job.name, folder=str(job.logs)),
        tunnel=_tunnel(job),
        packager=Staged(folder=staged),
        dependency_type="afterany",
        poll_estimated_start_time=False,
        **gpus,
    )


def _names(job: SlurmJob) -> list[str]:
    """Variables that the job sets, which pyxis would let those of the image win over."""
    return sorted({"OMP_NUM_THREADS", "PYTHONPATH", "PYTHONSAFEPATH"}.union(*job.env))


def _array(job: SlurmJob) -> str | None:
    if job.recipes == 1:
        return None
    limit = f"%{job.executor.parallel_jobs}" if job.executor.parallel_jobs else ""
    return f"1-{job.recipes}{limit}"


def _tunnel(job: SlurmJob) -> nemo_run.LocalTunnel | nemo_run.SSHTunnel:
    experiments = str(job.base / "experiments")
    if not job.executor.ssh:
        return nemo_run.LocalTunnel(job_dir=experiments)
    user, host, port = ssh_address(job.executor.ssh)
    identity = os.path.expanduser(job.executor.identity) if job.executor.identity else None
    return nemo_run.SSHTunnel(job_dir=experiments, host=host, user=user, port=port, identity=identity)


def ssh_address(text: str) -> tuple[str, str, int | None]:
    """User, host and port of [USER@]HOST[:PORT]; the user is the one here if none is named."""
    import getpass

    user, _, host = text.rpartition("@")
    host, _, port = host.partition(":")
    return user or getpass.getuser(), host, int(port) if port else None
