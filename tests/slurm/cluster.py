"""A Slurm cluster on this machine: a controller and three nodes, from Debian's packages, for the tests.

    python tests/slurm/cluster.py install              # as root: apt-get install
    python tests/slurm/cluster.py up FOLDER            # prints the line that points Slurm's commands at it
    python tests/slurm/cluster.py up FOLDER --accounting   # with slurmdbd and MariaDB
    python tests/slurm/cluster.py down FOLDER

Everything it writes is in FOLDER, everything it starts ends with `down`. It takes ports that are free, so it disturbs
no other cluster on this machine. Nodes n1 and n2 have 4 cores and 2 GPUs each, which exist on paper only. Jobs in the
partition `spare` yield to those in `main`: they are told to stop, and are queued again. n3 alone is in the partition
`apart`, for whoever wants to see a node fail.
"""

import argparse
import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("slurm-wlm", "munge")
SSH_PACKAGES = ("openssh-server", "rsync")
ACCOUNTING_PACKAGES = ("slurmdbd", "mariadb-server")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
SSH_PROGRAMS = ("sshd", "rsync")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db")
NODES = ("n1", "n2", "n3")

SLURM_CONF = """\
ClusterName=hybrid
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that is queued again waits as long as this, which is also the time in which a slow machine must start a job.
AuthInfo=socket={folder}/munge.socket,cred_expire=20
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
ReturnToService=2
MailProg=/bin/true
MpiDefault=none
MinJobAge=5
OverTimeLimit=0
# A machine with much else to do answers late, and that is no failure.
MessageTimeout=100
TCPTimeout=60
BatchStartTimeout=300
KillWait=300
UnkillableStepTimeout=600
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=4 RealMemory=4000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=4 RealMemory=4000 Gres=gpu:2
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={n3} CPUs=4 RealMemory=4000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=spare Nodes=n[1-2] MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=600
PartitionName=apart Nodes=n3 MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""
WITHOUT_ACCOUNTING = "AccountingStorageType=accounting_storage/none\n"
WITH_ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={database_daemon}
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations
JobAcctGatherType=jobacct_gather/none
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={database_daemon}
SlurmUser={user}
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""


def lacking(*, accounting: bool = False) -> str:
    """Say what keeps a cluster from being started here; empty if nothing does."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    wanted = [*PROGRAMS, *(ACCOUNTING_PROGRAMS if accounting else ())]
    missing = [name for name in wanted if not shutil.which(name, path=path)]
    if missing:
        return f"{', '.join(missing)} not installed; as root: python tests/slurm/cluster.py install"
    if os.geteuid() != 0:
        return "Slurm's daemons want root"
    return ""


def install() -> str:
    """Install Debian's packages, without starting what they bring; says why not where that cannot be done."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    programs = [*PROGRAMS, *ACCOUNTING_PROGRAMS, *SSH_PROGRAMS, "shellcheck"]
    if all(shutil.which(name, path=path) for name in programs):
        return ""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "Slurm's packages are installed by root, with apt-get"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    packages = [*PACKAGES, *SSH_PACKAGES, *ACCOUNTING_PACKAGES, "shellcheck"]
    for words in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", "-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=30", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            last = done.stdout.decode(errors="replace").strip().splitlines()[-5:]
            return "\n".join([f"apt-get {words[0]} failed:", *last])
    return ""


class Cluster:
    """A cluster in a folder; a context manager that starts and ends it."""

    def __init__(self, folder: Path, *, accounting: bool = False):
        self.folder = folder.resolve()
        self.accounting = accounting
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *command: str) -> str:
        """Run one of Slurm's commands on this cluster; returns what it prints."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    def stop(self) -> None:
        """End the daemons and the jobs' processes that are left."""
        with contextlib.suppress(RuntimeError, FileNotFoundError):
            self.run("scancel", "--full", "--signal=KILL", "--user", pwd.getpwuid(os.geteuid()).pw_name)
            self.run("scancel", "--user", pwd.getpwuid(os.geteuid()).pw_name)
            self._wait(lambda: not self.run("squeue", "--noheader"), "an empty queue", 15)
        for names in (["slurmctld", *(f"slurmd-{node}" for node in NODES)], ["slurmdbd"], ["mariadbd", "munged"]):
            _end([self.folder / f"{name}.pid" for name in names])
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left(self) -> list[int]:
        """Processes that this cluster has started and that live on: those of jobs when a daemon was ended first."""
        mark, found = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                # Those of the tests themselves have the variable, but no job's.
                variables = path.read_bytes().split(b"\0")
                if mark in variables and any(one.startswith(b"SLURM_JOB_ID=") for one in variables):
                    found.append(int(path.parent.name))
        return found

    def _start(self) -> None:
        folder = self.folder
        (folder / "state").mkdir(parents=True, exist_ok=True)
        os.chmod(folder, 0o755)  # munge refuses a socket that others cannot reach
        user = pwd.getpwuid(os.geteuid()).pw_name
        self._start_munge()
        ports = _free_ports("controller", "database_daemon", "database", *NODES)
        names = {"folder": folder, "user": user, "host": socket.gethostname(), **ports}
        if self.accounting:
            self._start_accounting(names)
        text = SLURM_CONF + (WITH_ACCOUNTING if self.accounting else WITHOUT_ACCOUNTING)
        (folder / "slurm.conf").write_text(text.format(**names))
        for gpu in ("gpu0", "gpu1"):  # Slurm counts devices: two more of /dev/null
            if not (folder / gpu).exists():
                os.mknod(folder / gpu, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-1]\n")
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        if self.accounting:
            self._add_accounts(user)
        self._daemon("slurmctld", "-f", str(folder / "slurm.conf"))
        for node in NODES:
            (folder / f"spool-{node}").mkdir(exist_ok=True)
            self._daemon("slurmd", "-N", node, "-f", str(folder / "slurm.conf"))
        self._wait(lambda: set(self.run("sinfo", "--noheader", "-o", "%t").split()) == {"idle"}, "idle nodes")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            key.chmod(0o400)
        options = {name: self.folder / f"munge.{name}" for name in ("socket", "seed")}
        self._daemon(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={options['socket']}",
            f"--seed-file={options['seed']}",
            f"--pid-file={self.folder / 'munged.pid'}",
            f"--log-file={self.folder / 'munged.log'}",
        )

    def _start_accounting(self, names: dict[str, Any]) -> None:
        user, data = names["user"], self.folder / "database"
        base = [f"--datadir={data}", f"--user={user}", "--no-defaults"]
        if not data.exists():
            self._do("mariadb-install-db", "--no-defaults", *base[:2], "--skip-test-db")
        log = (self.folder / "mariadbd.log").open("a")
        process = subprocess.Popen(
            [
                _program("mariadbd"),
                "--no-defaults",
                *base[:2],
                f"--socket={self.folder / 'mariadb.socket'}",
                f"--port={names['database']}",
                "--bind-address=127.0.0.1",
                f"--pid-file={self.folder / 'mariadbd.own.pid'}",
            ],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        (self.folder / "mariadbd.pid").write_text(str(process.pid))
        client = ["mariadb", "--no-defaults", f"--socket={self.folder / 'mariadb.socket'}", "-e"]
        self._wait(lambda: bool(self.run(*client, "SELECT 1")), "the database")
        for host in ("localhost", "127.0.0.1"):
            self.run(*client, f"CREATE USER IF NOT EXISTS 'slurm'@'{host}' IDENTIFIED BY 'slurm'")
            self.run(*client, f"GRANT ALL ON slurm_acct_db.* TO 'slurm'@'{host}'")
        configuration = self.folder / "slurmdbd.conf"
        configuration.write_text(SLURMDBD_CONF.format(**names))
        configuration.chmod(0o600)
        # slurmdbd looks for its configuration beside slurm.conf.
        self._daemon("slurmdbd")

    def _add_accounts(self, user: str) -> None:
        self._wait(lambda: bool(self.run("sacctmgr", "--noheader", "show", "stats")), "slurmdbd")
        self.run("sacctmgr", "-i", "add", "cluster", "hybrid")
        self.run("sacctmgr", "-i", "add", "account", "research", "Cluster=hybrid")
        self.run("sacctmgr", "-i", "add", "user", user, "Account=research", "Cluster=hybrid")

    def _daemon(self, name: str, *options: str) -> None:
        self._do(name, *options)

    def _do(self, name: str, *options: str) -> None:
        done = subprocess.run(
            [_program(name), *options],
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "start.log").open("a"),
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise RuntimeError(f"{name} did not start: {(self.folder / 'start.log').read_text()[-2000:]}")

    def _wait(self, holds: "object", what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                if holds():  # pyright: ignore[reportCallIssue]
                    return
                error = ""
            except RuntimeError as failure:
                error = str(failure)
            if time.monotonic() > end:
                raise RuntimeError(f"{what} did not come up in {seconds:.0f} s; see {self.folder}. {error}")
            time.sleep(0.3)


def _free_ports(*names: str) -> dict[str, int]:
    """A free port for each name, below those that the system gives out by itself."""
    ports = {}
    for port in random.sample(range(15000, 32000), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports[names[len(ports)]] = port
        if len(ports) == len(names):
            return ports
    raise RuntimeError("no ports are free")


def _program(name: str) -> str:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=path)
    if not found:
        raise RuntimeError(f"{name} is not installed")
    return found


def _end(pid_files: list[Path]) -> None:
    """Ask daemons to end, wait for them, and make those end that do not."""
    left = {}
    for path in pid_files:
        with contextlib.suppress(OSError, ValueError):
            left[path] = int(path.read_text())
    for number, seconds in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 10.0)):
        for pid in left.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + seconds
        while left and time.monotonic() < end:
            for path, pid in list(left.items()):
                if not _lives(pid):
                    path.unlink(missing_ok=True)
                    del left[path]
            time.sleep(0.05)


def _lives(pid: int) -> bool:
    """Whether a process does anything yet; one that has ended is there until its parent has noticed."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> int:
    """Bring a cluster up or down."""
    parser = argparse.ArgumentParser(description="A Slurm cluster on this machine, for tests.")
    parser.add_argument("verb", choices=["install", "up", "down"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB")
    given = parser.parse_args()
    if given.verb == "install":
        if reason := install():
            print(reason, file=sys.stderr)
        return 1 if reason else 0
    if given.folder is None:
        parser.error("FOLDER is missing")
    cluster = Cluster(given.folder, accounting=given.accounting)
    if given.verb == "down":
        cluster.stop()
        return 0
    if reason := lacking(accounting=given.accounting):
        print(reason, file=sys.stderr)
        return 1
    cluster.__enter__()
    print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
