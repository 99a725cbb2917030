"""What is remembered of a start, in `RUN/job.json`: enough to come back to it from another shell, later."""

import hashlib
import json
import os
import shlex
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from hybrid import atomic, settings_file
from hybrid.errors import ConfigError, Problem, UserError, nearest
from hybrid.training.folder import JOB_FILE as FILE_NAME
from hybrid.training.folder import writable

LOGS = "logs"
_LONGEST_SOCKET = 88  # unix(7) has 108 bytes; ssh adds 17 while it connects
SWEEP_FILE = "sweep.json"  # in the folder that is called like a sweep


@dataclass(kw_only=True)
class Record:
    """One start of a run, or of a sweep.

    `run` is the run's folder where the job runs. `ids` are Slurm's of a chain's jobs or of a sweep's array, or the
    container's; `process` is the id of a local one and the moment of its start in clock ticks since the machine's,
    `machine` where that was. `log` and `ended` are the names of the files that a job writes and leaves its exit code
    in, in `run` if they are relative; %j stands for the job.
    """

    kind: Literal["local", "docker", "slurm"]
    name: str
    run: str
    sent: str = ""  # ISO 8601
    ids: list[str] = field(default_factory=list)
    log: str = ""
    ended: str = f"{LOGS}/exit_%j"
    ssh: str | None = None
    identity: str | None = None
    process: tuple[int, int] | None = None
    machine: str = ""
    command: str = ""  # docker or podman


def write(record: Record, folder: Path) -> None:
    """Remember a start in the run's folder on this machine. Raises UserError if it cannot be written."""
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(folder / FILE_NAME, json.dumps(asdict(record), indent=1) + "\n")


def read(folder: Path) -> Record | None:
    """The newest start of the run in a folder of this machine; None if there was none, or it is not to be read.

    A folder that was moved or copied since is asked where it is now.
    """
    try:
        values = json.loads((folder / FILE_NAME).read_text())
        record = Record(**values)
    except (OSError, ValueError, TypeError):
        return None
    if record.process:
        record.process = (record.process[0], record.process[1])
    now = os.path.abspath(folder)
    there = record.ssh or (record.kind != "local" and Path(record.run).is_dir())
    if now != os.path.abspath(record.run) and not there:
        record.run, record.name = now, Path(now).name
    return record


def find(reference: str, runs: str = "runs") -> Path:
    """The folder of the run that a name or a path means. Raises ConfigError with the runs there are."""
    for folder in (Path(runs) / reference, Path(reference)):
        if is_run(folder):
            return folder
    names = [folder.name for folder in folders(runs)]
    there = f"runs here: {', '.join(names)}" if names else f"there are no runs in '{runs}' here"
    raise ConfigError(Problem(reference, f"there is no such run{nearest(reference, names)}", there))


def folders(runs: str = "runs") -> list[Path]:
    """The folders of the runs there are, the newest first."""
    found = [folder for folder in Path(runs).glob("*") if is_run(folder)]
    return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or what is common to those of a sweep."""
    return any((folder / name).is_file() for name in (FILE_NAME, settings_file.FILE_NAME, SWEEP_FILE))


def ask(record: Record, script: str) -> bytes:
    """What a script of bash prints in the folder of the run, on its machine. Raises UserError if SSH fails."""
    return shell(f"cd {shlex.quote(record.run)} 2>/dev/null || exit 0\n{script}", record.ssh, record.identity)


def shell(script: str, ssh: str | None = None, identity: str | None = None) -> bytes:
    """What a script of bash prints, here or at [USER@]HOST[:PORT]. Raises UserError in SSH's own words if it fails."""
    command = ["bash", "-s"] if not ssh else [*ssh_command(ssh, identity), "bash", "-s"]
    try:
        done = subprocess.run(command, input=script.encode(), capture_output=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed here") from None
    if ssh and done.returncode == 255:  # ssh's own failures, ssh(1)
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"{ssh}: {said[-1] if said else 'SSH failed'}")
    return done.stdout


def ssh_command(address: str, identity: str | None) -> list[str]:
    """The words that run a command at [USER@]HOST[:PORT]. It asks for nothing, and stays open for a minute."""
    host, _, port = address.partition(":")
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]
    # One connection for all that is asked while a log is followed.
    if socket := _socket(address, identity):
        options += ["-o", "ControlMaster=auto", "-o", "ControlPersist=60", "-o", f"ControlPath={socket}"]
    if port:
        options += ["-p", port]
    if identity:
        options += ["-i", os.path.expanduser(identity)]
    return ["ssh", *options, host]


def _socket(address: str, identity: str | None) -> Path | None:
    """Where the connection to an address with a key is shared; None where the path is too long for a socket."""
    folder = Path.home() / ".cache" / "hybrid-recipes" / "ssh"
    path = folder / hashlib.sha256(f"{address} {identity}".encode()).hexdigest()[:12]
    if len(str(path)) > _LONGEST_SOCKET:
        return None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
