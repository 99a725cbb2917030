"""What a Slurm job does: the lines of bash and the command that nemo-run puts into its sbatch script.

Everything that nemo-run would leave unquoted, in the open or to chance is settled here: variables keep their names and
values, the interpreter is named by its path, the port where the nodes meet is free, an exit code means what it says.
A job queues itself again when Slurm has asked it to stop, and says how it ended in `RUN/logs/exit_JOB`, so that this is
known on clusters without accounting, too. It runs the code of the machine it was sent from, out of its own folder.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from recipes.executors import Slurm, mount_pairs
from recipes.registry import RECIPE_FILE

# What a run that was asked to stop ends with (hybrid/training/interrupt.py): SIGUSR1 and SIGTERM.
_WARNED, _STOPPED = 138, 143
# Below the ports that Linux gives out by itself (32768 and up).
_FIRST_PORT, _PORTS = 10000, 20000
# nemo-run's name for a job's folder inside a container; without one it replaces this text by the folder's path.
CONTAINER_FOLDER = "/nemo_run"


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """One submission: a run, a chain of jobs that go on with it, or a sweep as an array."""

    name: str
    stamp: str  # makes the submission's folder unique
    executor: Slurm
    devices: int  # processes on a node
    run: PurePosixPath  # the run's folder on the cluster
    start: PurePosixPath  # folder on the cluster where the job starts
    env: Sequence[Mapping[str, str]] = ({},)  # variables of each run
    prefix: tuple[str, ...] = ()  # words before the command, of a profiler
    folders: tuple[str, ...] = ()  # to be made in the run's
    repeats: int = 1  # jobs of a chain
    local_python: str = "python3"

    @property
    def experiment(self) -> str:
        """nemo-run's id of the submission."""
        return f"{self.name}_{self.stamp}"

    @property
    def recipes(self) -> int:
        """Runs of a sweep, one otherwise."""
        return len(self.env)

    @property
    def processes(self) -> int:
        """Processes of one run."""
        return self.executor.nodes * self.devices

    @property
    def base(self) -> PurePosixPath:
        """Folder on the cluster that holds what nemo-run sends."""
        return self.run / "jobs"

    @property
    def logs(self) -> PurePosixPath:
        """Folder on the cluster with what the jobs write."""
        return self.run / "logs"

    @property
    def tasks(self) -> list[str]:
        """nemo-run's names of the jobs."""
        return [self.name] if self.repeats == 1 else [f"{self.name}-{number + 1}" for number in range(self.repeats)]

    def folder(self, task: str) -> PurePosixPath:
        """Folder of one job on the cluster: recipe, code, versions."""
        return self.base / "experiments" / self.name / self.experiment / task

    @property
    def python(self) -> str:
        """The interpreter of the job."""
        here = not self.executor.container and not self.executor.ssh
        return self.executor.python or (self.local_python if here else "python3")


def quote(text: str) -> str:
    """Return `text` as one word of bash that nemo-run leaves as it is."""
    # Two quotes stand for nothing in bash, inside of single quotes and outside.
    return shlex.quote(text).replace(CONTAINER_FOLDER, "/''" + CONTAINER_FOLDER[1:])


def inside(path: PurePosixPath, executor: Slurm) -> PurePosixPath | None:
    """What a folder of the cluster is called in the job; None if the container does not see it."""
    if not executor.container:
        return path
    for mount in mount_pairs(executor.mounts):
        host, container = mount.split(":")[:2]
        if path.is_relative_to(host):
            return PurePosixPath(container) / path.relative_to(host)
    return None


def command(job: SlurmJob, task: str) -> list[str]:
    """Words of the command that srun starts on each node, quoted."""
    folder = CONTAINER_FOLDER if job.executor.container else str(job.folder(task))
    recipe = RECIPE_FILE if job.recipes == 1 else "recipe-$SLURM_ARRAY_TASK_ID.yaml"
    words = [*map(quote, job.prefix), quote(job.python), "-u"]
    if job.processes > 1:
        words += ["-m", "recipes.torchrun", f'"{folder}/ranks-$SLURM_JOB_ID"']
        words += ["--nnodes", str(job.executor.nodes)] if job.executor.nodes > 1 else ["--standalone"]
        words += ["--nproc-per-node", str(job.devices)]
    return [*words, "-m", "recipes.worker", f'"{folder}/{recipe}"']


def setup(job: SlurmJob, task: str) -> str:
    """The lines of bash before the command."""
    executor = job.executor
    identity = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.recipes > 1 else "$SLURM_JOB_ID"
    lines = [
        # nemo-run's script shows each line it runs; variables are nobody else's business.
        "{ set +vx; } 2>/dev/null",
        "exec 2>&1",
        # With it, srun gives the ranks a terminal, and a log of progress bars is what comes of that.
        "unset SLURM_UNBUFFEREDIO FORCE_COLOR running asked failed",
        f"job={job.folder(task)}",
        f"logs={job.logs}",
        f'ended="$logs/exit_{identity}"',
        "start=$((${SLURM_RESTART_COUNT:-0} + 1))",
        f'echo "== {job.name}: job {identity} on $SLURM_JOB_NODELIST, start $start, $(date)"',
        *_ending(job),
        *_beginning(job),
        *executor.setup,
        *_exports(job.env),
        *(f"mkdir -p {job.run / folder}" for folder in job.folders),
        f"export HYBRID_JOB={job.experiment}",
        f'export PYTHONSAFEPATH=1 PYTHONPATH="{_code(job)}${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"threads=$((${{SLURM_CPUS_ON_NODE:-1}} / {job.devices}))",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}",
    ]
    if executor.cpus:
        # Since Slurm 22.05, srun does not take it from sbatch.
        lines.append('export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"')
    if executor.nodes > 1:
        lines += [
            "MASTER_ADDR=$(hostname)",
            f"MASTER_PORT=$(({_FIRST_PORT} + SLURM_JOB_ID % {_PORTS}))",
            'while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done',
            "export MASTER_ADDR MASTER_PORT",
        ]
    if job.processes > 1:
        lines.append("running=yes")
    return "\n".join(lines)


def _code(job: SlurmJob) -> str:
    return f"{CONTAINER_FOLDER}/code" if job.executor.container else "$job/code"


def _exports(env: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines that set the variables of a run, or of each run of a sweep where they differ."""
    first, *others = env
    common = {name for name, value in first.items() if all(one.get(name) == value for one in others)}
    lines = [f"export {name}={quote(first[name])}" for name in first if name in common]
    for number, one in enumerate(env, start=1):
        if own := " ".join(f"{name}={quote(value)}" for name, value in one.items() if name not in common):
            lines.append(f"((SLURM_ARRAY_TASK_ID == {number})) && export {own}")
    return lines


def _beginning(job: SlurmJob) -> list[str]:
    """Lines that end the job if there is nothing left for it to do, and clear what an earlier start of it has left."""
    requeues = job.executor.requeues
    lines = [
        'rm -f "$ended" "$job/ranks-$SLURM_JOB_ID"/*.code',
        f"if ((start > {requeues + 1})); then",
        f'  echo "the job was queued again {requeues} times, which is the limit (executor.requeues)"',
        "  exit 1",
        "fi",
    ]
    if job.repeats > 1:
        lines += [
            f'if [[ -e "$logs/chain_{job.stamp}" ]]; then',
            f'  code=$(cat "$logs/chain_{job.stamp}")',
            '  echo "the run ended in a job before this one, with exit code $code"',
            '  exit "$code"',
            "fi",
        ]
    return lines


def _ending(job: SlurmJob) -> list[str]:
    """Lines that say how the job ended, and queue it again if Slurm has asked it to stop."""
    requeues = job.executor.requeues
    again = [f"{_STOPPED}:RUNNING:*"]
    if job.repeats == 1:  # in a chain, the next job goes on after the time limit
        again += [f"{_WARNED}:RUNNING:*", "*:COMPLETING:TimeLimit"]
    lines = [
        "finish() {",
        "  code=$?",
        *(_node_codes(job.executor.nodes) if job.processes > 1 else []),
        '  state=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null)',
        r'  [[ $state =~ JobState=([A-Z_]+)\ Reason=([A-Za-z]+) ]] && state="${BASH_REMATCH[1]}:${BASH_REMATCH[2]}"',
        '  case "$code:$state" in',
        f"    ({'|'.join(again)})",
        f"      if ((start <= {requeues})); then",
        f'        echo "== stopped; queued again, $start of {requeues}"',
        '        scontrol requeue "$SLURM_JOB_ID" && exit "$code"',
        "      else",
        f'        echo "== stopped; not queued again, that was done {requeues} times"',
        "      fi ;;",
        "  esac",
    ]
    if job.repeats > 1:
        goes_on = f"{_WARNED}:*|{_STOPPED}:*|*:COMPLETING:TimeLimit"
        lines.append(f'  case "$code:$state" in ({goes_on}) ;; (*) echo "$code" > "$logs/chain_{job.stamp}" ;; esac')
    return [
        *lines,
        '  echo "$code $state" > "$ended"',
        '  echo "== ended with exit code $code, $(date)"',
        '  exit "$code"',
        "}",
        "trap finish EXIT",
        "trap : TERM USR1",
    ]


def _node_codes(nodes: int) -> list[str]:
    """Lines that take the exit code from what the nodes wrote (`recipes.torchrun`).

    srun's is the largest of all, and it ends the other nodes with SIGTERM when one has failed.
    """
    return [
        "  if [[ $running ]]; then",
        '    mapfile -t codes < <(cat "$job/ranks-$SLURM_JOB_ID"/*.code 2>/dev/null)',
        '    for one in "${codes[@]}"; do',
        f'      case "$one" in (0) ;; ({_WARNED}|{_STOPPED}) asked=$one ;; (*) failed=$one ;; esac',
        "    done",
        "    if [[ $failed ]]; then code=$failed",
        f"    elif ((${{#codes[@]}} == {nodes})); then code=${{asked:-0}}",
        f"    elif ((code == 0 || code == {_WARNED} || code == {_STOPPED})); then code=1",
        "    fi",
        "  fi",
    ]


def srun_options(job: SlurmJob) -> list[str]:
    """Options of srun beyond nemo-run's, quoted."""
    where = inside(job.start, job.executor)
    option = "--container-workdir" if job.executor.container else "--chdir"
    own = [f"{option}={where}"] if where else []  # nemo-run has given the code's folder before; srun takes the last
    return [quote(word) for word in [*own, *job.executor.srun]]


def sbatch_options(job: SlurmJob) -> dict[str, str | bool]:
    """sbatch options that are no fields of nemo-run's executor."""
    executor = job.executor
    identity = "%A_%a" if job.recipes > 1 else "%j"
    options: dict[str, str | bool] = {"error": f"{job.logs}/{job.name}_{identity}.err"}
    if executor.warning:
        options["signal"] = f"USR1@{executor.warning}"
    if executor.dependency:
        options["dependency"] = executor.dependency
    return options | {name: text or True for name, text in executor.sbatch.items()}
