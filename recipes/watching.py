"""Coming back to a run from any shell: how it stands, what it writes, making it stop. Imports no nemo-run.

How a Slurm job stands is asked of squeue while Slurm knows it, then of the file that the job itself leaves
(`slurm_script`), then of sacct. So it is known without accounting, and after Slurm has forgotten the job.
"""

import json
import os
import re
import shlex
import signal
import socket
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hybrid import settings_file
from hybrid.errors import ConfigError, Problem, UserError
from hybrid.training import folder as run_folder
from recipes import records
from recipes.records import Record

Status = Literal["queued", "running", "finished", "stopped", "cancelled", "failed", "unknown"]

# Job states of Slurm 22.05 and newer, squeue(1).
_QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
_ENDED: dict[str, Status] = {"COMPLETED": "finished", "CANCELLED": "cancelled", "PREEMPTED": "stopped"}
_ENDED |= {"TIMEOUT": "stopped"}
_LIVE = ("queued", "running")
# 128 + SIGINT, SIGUSR1, SIGTERM: asked to stop (hybrid/training/interrupt.py).
_STOPPED = (130, 138, 143)
_BEFORE_ITS_START = f"{128 + signal.SIGTERM} COMPLETING:Cancelled"  # said for a job as it would say it itself
_LAST_LINES = 20
_MEDIAN_STEPS = 50  # a step just before a stop is no measure
# What recipes.worker and recipes.torchrun say; the others fail after the first, where they wait for it.
_FAILED_RANK = re.compile(r"the last lines of rank |rank \d+ (failed:|on \S+ (died|ended) )")
_SECTIONS = ("metrics", "settings", "queue", "ended", "log")
_SECONDS = 2.0  # between two looks at a run that is followed


@dataclass
class Job:
    """How one job of a run stands."""

    identity: str
    status: Status = "unknown"
    detail: str = ""
    code: int | None = None


@dataclass
class State:
    """How a run stands. `step` of `steps` is the newest that is recorded, `loss` its loss, `validation` those of the
    newest validation by the name of the held-out set (None: not a number), `bits_per_byte` likewise, `metrics` what
    else the newest step recorded, times and speeds as medians of the newest steps.
    """

    name: str
    kind: str
    status: Status
    detail: str
    jobs: list[Job]
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    validation: dict[str, float | None] = field(default_factory=dict)
    bits_per_byte: dict[str, float | None] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    last_lines: list[str] = field(default_factory=list)

    @property
    def code(self) -> int:
        """What a command that waited for the run ends with."""
        if self.status == "finished":
            return 0
        codes = [job.code for job in self.jobs if job.code]
        return codes[-1] if codes else 1

    def measured(self) -> Iterator[str]:
        """What `hybrid status` says of the newest metrics, line by line."""
        for name, loss in self.validation.items():
            bits = self.bits_per_byte[name]
            known = loss is not None and bits is not None
            yield f"{name}: loss {loss:.4f}, {bits:.3f} bits per byte" if known else f"{name}: loss is not a number"
        if self.step and not self.validation:
            yield "no validation yet (trainer.eval_interval, and the end of the run)"
        at = self.metrics
        if "tokens_per_second" in at:
            mfu = f", MFU {at['mfu']:.1%}" if "mfu" in at else ""
            yield f"{at['tokens_per_second']:,.0f} tokens/s, {at['step_seconds']:.3f} s a step{mfu}"
        if "data_seconds" in at:
            phases = ("data", "forward_backward", "optimizer", "other")
            shares = ", ".join(f"{phase.replace('_', ' and ')} {at[f'{phase}_seconds']:.3f} s" for phase in phases)
            yield f"of a step: {shares}; memory {at['memory_gib']:.2f} GiB"
        if "slowest_rank" in at:
            slow, usual = at["slowest_seconds"], at["median_rank_seconds"]
            yield f"slowest rank {at['slowest_rank']:.0f}: {slow:.3f} s of its own work a step, usual is {usual:.3f} s"


def state(folder: Path) -> State:
    """How the run in a folder of this machine stands. Raises UserError if its machine does not answer."""
    record = records.read(folder)
    if record is None:
        return _unrecorded(folder)
    answer = _sections(records.ask(record, _question(record)))
    jobs = _jobs(record, answer)
    status, detail = _summary(jobs)
    found = State(record.name, record.kind, status, detail, jobs, *_progress(answer))
    if status == "failed":
        found.last_lines = _last_lines(answer["log"])
    return found


def refuse_under_way(folder: Path) -> None:
    """Raise ConfigError if the run in a folder is queued or running."""
    if records.read(folder) is None:
        return
    found = state(folder)
    if found.status in ("queued", "running"):
        message = (
            f"the run '{found.name}' is {found.status}{f' ({found.detail})' if found.detail else ''}; wait for it, "
            f"`hybrid cancel {found.name}`, or name this run otherwise (name=...)"
        )
        raise ConfigError(Problem("name", message))


def follow(folder: Path, out: Any = None) -> int:
    """Print what a run writes, from its beginning until it has ended; returns its exit code."""
    record = records.read(folder)
    if record is None:
        message = "it is not known how this run was started, so there is no output to follow"
        raise ConfigError(Problem(str(folder), message))
    out, said = out or sys.stdout, ""
    seen = dict.fromkeys(_identities(record), 0)
    while True:
        answer = _sections(records.ask(record, _question(record)))
        jobs = _jobs(record, answer)
        for identity in seen:
            new = records.ask(record, f"{_log(record, identity)} | tail -c +{seen[identity] + 1}")
            seen[identity] += len(new)
            out.write(new.decode(errors="replace"))
        status, detail = _summary(jobs)
        if status == "queued" and detail and detail != said:
            said = detail
            print(f"{record.name} is queued: {detail}", file=sys.stderr)
        out.flush()
        if status not in _LIVE:
            return State(record.name, record.kind, status, detail, jobs).code
        time.sleep(_SECONDS)


def log(folder: Path) -> str:
    """What a run has written so far."""
    record = records.read(folder)
    if record is None:
        path = folder / run_folder.LOG_FILE
        return path.read_text() if path.is_file() else ""
    script = "\n".join(_log(record, identity) for identity in _identities(record))
    return records.ask(record, script).decode(errors="replace")


def cancel(folder: Path) -> str:
    """Ask a run to save and stop; returns what was done.

    Raises ConfigError if it is not running, or not the user's own, UserError if it cannot be asked.
    """
    record = records.read(folder)
    found = state(folder)
    if record is None or found.status not in _LIVE:
        how = f"{found.status}{f' ({found.detail})' if found.detail else ''}"
        raise ConfigError(f"{found.name} is not running: {how}; there is nothing to cancel")
    if record.kind == "slurm":
        ids = [job.identity for job in found.jobs if job.status in _LIVE]
        # A job that has not begun leaves no word of its own, and Slurm soon forgets it.
        waiting = [_ended_path(record, job.identity) for job in found.jobs if job.status == "queued"]
        words = [f"scancel {' '.join(ids)} 2>&1", *(f"echo {_BEFORE_ITS_START} > {path}" for path in waiting)]
        if said := records.ask(record, "\n".join(words)).decode(errors="replace").strip():
            raise UserError(said)
        what = f"job {ids[0]} is" if len(ids) == 1 else f"jobs {', '.join(ids)} are"
        return f"{what} cancelled; a run that has begun saves first"
    if record.kind == "docker":
        records.ask(record, f"{record.command} kill --signal=TERM {record.ids[0]} >/dev/null 2>&1")
        return f"container {record.ids[0]} saves and stops"
    assert record.process
    pid = record.process[0]
    try:
        if os.getpgid(pid) == pid:  # detached: the shell that waits for it leads its group
            os.killpg(pid, signal.SIGTERM)
        else:
            os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        raise ConfigError(f"{found.name} has just ended; there is nothing left to cancel") from None
    except PermissionError:
        raise ConfigError(f"process {pid} of {found.name} is another user's, who alone can cancel it") from None
    return f"process {pid} saves and stops"


def process_start(pid: int) -> int:
    """When a process began, in clock ticks since the machine's start; 0 if there is none. Tells it from a later one."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def _question(record: Record) -> str:
    """The script that tells how a run stands: sections, each after a line with @ and its name."""
    lines = [
        # The newest validation may be far before the end.
        "echo @metrics; grep -a _bits_per_byte metrics.jsonl 2>/dev/null | tail -n 20; tail -c 20000 metrics.jsonl "
        "2>/dev/null; echo",
        f"echo @settings; cat {settings_file.FILE_NAME} 2>/dev/null; echo",
    ]
    if record.kind == "slurm":
        ids = ",".join(record.ids)
        # The columns: job, state, why it waits, when it is to start, where it runs.
        lines.append(f"echo @queue; squeue --noheader --array --states=all -j {ids} -o '%i|%T|%r|%S|%N' 2>/dev/null")
    if record.kind == "docker":
        inspect = "inspect --format '{{.State.Status}} {{.State.ExitCode}}'"
        lines.append(f"echo @queue; {record.command} {inspect} {record.ids[0]} 2>/dev/null")
    # After the queue: a job that has ended by what the queue says has left its word before.
    lines += ["echo @ended", *(_ended(record, identity) for identity in _identities(record))]
    logs = "; ".join(f"{_log(record, identity)} | tail -c 20000" for identity in _identities(record))
    return "\n".join([*lines, f"echo @log; {logs}"])


def _ended_path(record: Record, identity: str) -> str:
    return shlex.quote(record.ended.replace("%j", identity))


def _ended(record: Record, identity: str) -> str:
    path = _ended_path(record, identity)
    return f'[ -e {path} ] && echo "{identity} $(cat {path})"'


def _identities(record: Record) -> list[str]:
    return ["local"] if record.kind == "local" else record.ids


def _log(record: Record, identity: str) -> str:
    """The command that prints what a job has written."""
    if record.kind == "docker":
        return f"{record.command} logs {identity} 2>&1"
    return f"cat {shlex.quote(record.log.replace('%j', identity))} 2>/dev/null"


def _sections(answer: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    name, rest = "", answer.decode(errors="replace")
    for section in _SECTIONS:
        before, mark, after = rest.partition(f"@{section}\n")
        if mark:
            found[name], name, rest = before, section, after
    found[name] = rest
    return {section: found.get(section, "") for section in _SECTIONS}


def _jobs(record: Record, answer: dict[str, str]) -> list[Job]:
    jobs = {identity: Job(identity) for identity in _identities(record)}
    for line in answer["ended"].splitlines():
        words = line.split()
        if len(words) > 1 and words[1].isdigit():  # else the file is just being written, or was on a full disk
            jobs[words[0]] = _by_code(words[0], int(words[1]), " ".join(words[2:]))
    if record.kind == "local":
        return [_local(record, jobs["local"])]
    if record.kind == "docker":
        return [_container(record, answer["queue"])]
    for line in answer["queue"].splitlines():
        identity, name, reason, start, nodes = line.split("|", 4)
        if identity not in jobs:
            continue
        if name in _QUEUED:
            when = f"expected to start {start}" if start not in ("N/A", "") else ""
            why = reason if reason != "None" else ""
            jobs[identity] = Job(identity, "queued", ", ".join(filter(None, (why, when))))
        elif name in _RUNNING:
            jobs[identity] = Job(identity, "running", f"on {nodes}")
        elif jobs[identity].status == "unknown":
            jobs[identity] = Job(identity, _ENDED.get(name, "failed"), name)
    if lost := [job for job in jobs.values() if job.status == "unknown"]:
        _ask_accounting(record, lost)
    return list(jobs.values())


def _ask_accounting(record: Record, jobs: list[Job]) -> None:
    """Let sacct say how jobs ended that left no word; on a cluster without accounting it says nothing."""
    ids = ",".join(job.identity for job in jobs)
    script = f"sacct --noheader --allocations --parsable2 -j {ids} -o JobID,State,ExitCode 2>/dev/null"
    answer = records.ask(record, script).decode(errors="replace")
    rows = dict(line.split("|", 1) for line in answer.splitlines() if "|" in line)
    for job in jobs:
        job.detail = "Slurm does not know the job any more, and it left no word"
        if job.identity in rows:
            name, _, code = rows[job.identity].partition("|")
            name = name.split()[0]  # CANCELLED by 1000
            job.status, job.detail = _ENDED.get(name, "failed"), name
            job.code = int(code.split(":")[0]) or None


def _by_code(identity: str, code: int, state_then: str) -> Job:
    if code == 0:
        return Job(identity, "finished", "", 0)
    if state_then == "COMPLETING:TimeLimit":
        return Job(identity, "stopped", "at its time limit", code)
    if state_then.startswith("COMPLETING:"):  # while it was running: somebody's scancel
        return Job(identity, "cancelled", "", code)
    if code in _STOPPED:
        return Job(identity, "stopped", "goes on with the same command", code)
    return Job(identity, "failed", f"exit code {code}", code)


def _local(record: Record, job: Job) -> Job:
    assert record.process
    if record.machine != socket.gethostname():
        return Job(job.identity, "unknown", f"it was started on {record.machine}")
    pid, began = record.process
    # A process can go on after its run: a notebook, or a script that starts several.
    if job.status == "unknown" and process_start(pid) == began:
        return Job(job.identity, "running", f"process {pid}")
    if job.status == "unknown":  # unless it ended after it was asked for its word
        words = records.ask(record, _ended(record, job.identity)).decode().split()
        if len(words) > 1:
            return _by_code(job.identity, int(words[1]), "")
        return Job(job.identity, "failed", "its process is gone without a word: killed, or the machine was")
    return job


def _container(record: Record, answer: str) -> Job:
    identity = record.ids[0]
    status, _, code = answer.strip().partition(" ")
    if not status:
        return Job(identity, "unknown", f"{record.command} does not know the container any more")
    if status in ("created", "running", "paused", "restarting"):
        return Job(identity, "running", f"container {identity}")
    return _by_code(identity, int(code), "")


def _summary(jobs: list[Job]) -> tuple[Status, str]:
    """How a run of several jobs stands: what goes on, else what the last that did anything came to."""
    for status in ("running", "queued"):
        for job in jobs:
            if job.status == status:
                return status, job.detail
    for status in ("failed", "cancelled", "unknown"):
        for job in jobs:
            if job.status == status:
                return status, job.detail
    return jobs[-1].status, jobs[-1].detail


def _progress(
    answer: dict[str, str],
) -> tuple[int | None, int | None, float | None, dict[str, float | None], dict[str, float | None], dict[str, float]]:
    step, loss, validation, bits = None, None, {}, {}
    newest: deque[dict[str, float]] = deque(maxlen=_MEDIAN_STEPS)
    for entry in entries(answer["metrics"]):
        step = entry.get("step", step)
        loss = entry.get("loss", loss)
        if "loss" in entry:
            newest.append({name: value for name, value in entry.items() if name != "step" and value is not None})
        for name in [key.removesuffix("_bits_per_byte") for key in entry if key.endswith("_bits_per_byte")]:
            validation[name], bits[name] = entry[f"{name}_loss"], entry[f"{name}_bits_per_byte"]
    metrics = newest[-1] if newest else {}
    for name in [name for name in metrics if name.endswith("_seconds") or name in ("tokens_per_second", "mfu")]:
        metrics[name] = statistics.median(each[name] for each in newest if name in each)
    return step, _steps(answer["settings"]), loss, validation, bits, metrics


def entries(text: str) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, or of its end."""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the first one is cut, the last one may be half written
            continue
        if isinstance(entry, dict):
            yield entry


def _steps(text: str) -> int | None:
    try:
        return settings_file.from_dict(json.loads(text), settings_file.FILE_NAME).trainer.steps
    except (ValueError, TypeError, ConfigError):
        return None


def _last_lines(log: str) -> list[str]:
    """The last lines of the rank that failed, else of the log."""
    # What srun and the script say when a rank has failed is about the others.
    after = ("srun: ", "job exited with code ", "== ")
    lines = [line for line in log.rstrip().splitlines() if not line.startswith(after)]
    for number, line in enumerate(lines):
        if _FAILED_RANK.match(line):
            return lines[number : number + 2 * _LAST_LINES]
    return lines[-_LAST_LINES:]


def _unrecorded(folder: Path) -> State:
    """A run that was not started through `launch`: what its files say."""
    record = Record(kind="local", name=folder.name, run=os.path.abspath(folder))
    answer = _sections(records.ask(record, _question(record)))
    return State(folder.name, "", "unknown", "it is not known how it was started", [], *_progress(answer))
