"""`python -m recipes.torchrun LOGS ARGUMENTS`: torchrun on this interpreter, as one node's part of a run.

- The console has the output of the first rank alone; the others write into the folder LOGS, and when one fails, the end
  of what it wrote is printed. LOGS is removed when all went well.
- Signals that ask a run to save are passed on once, and then the ranks have all the time they need. torchrun itself
  would kill them after 30 seconds.
- The exit code is that of the rank that failed first, 128 + N if it died of signal N. torchrun's is always 1. It is
  also in LOGS/nodeN.code: srun's own is no guide, since it ends the other nodes when one has failed.
- Of several nodes, Slurm's environment says which one this is; MASTER_ADDR and MASTER_PORT say where they meet.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hybrid.training import interrupt

_LAST_LINES = 30


def main(logs: Path, arguments: list[str]) -> int:
    """Run torchrun with these arguments and write down its exit code; returns it."""
    node = int(os.environ.get("SLURM_NODEID", "0")) if "--standalone" not in arguments else 0
    code = 1
    try:
        code = _run(logs / f"node{node}", node, arguments)
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else 1
    finally:
        with contextlib.suppress(OSError):  # on a full disk, what ended the run is what is to be said
            logs.mkdir(parents=True, exist_ok=True)
            (logs / f"node{node}.code").write_text(f"{code}\n")
    return code


def _run(own: Path, node: int, arguments: list[str]) -> int:
    with interrupt.ends_at_once():
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in interrupt.SIGNALS:
        signal.signal(number, _pass_on)
    shutil.rmtree(own, ignore_errors=True)
    try:
        # SIGQUIT, because the list may not be empty.
        torchrun(
            [*_meeting(arguments, node), *_output(arguments, own, node), "--signals-to-handle=SIGQUIT", *arguments]
        )
    except ChildFailedError as error:
        return _report(error, own)
    shutil.rmtree(own, ignore_errors=True)
    return 0


def _meeting(arguments: list[str], node: int) -> list[str]:
    if "--standalone" in arguments:
        return []
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    return [f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}"]


def _output(arguments: list[str], own: Path, node: int) -> list[str]:
    """Send the output of every rank but the first into files."""
    count = int(arguments[arguments.index("--nproc-per-node") + 1])
    quiet = [f"{rank}:3" for rank in range(count) if rank or node]
    return [f"--log-dir={own}", f"--redirects={','.join(quiet)}"] if quiet else []


def _pass_on(number: int, _: FrameType | None) -> None:
    """Signal the ranks, each of which torchrun has made the leader of a session of its own."""
    ranks = list(_ranks())
    if not ranks:  # still waiting for the other nodes
        sys.exit(128 + number)
    for rank in ranks:
        try:
            os.kill(rank, number)
        except ProcessLookupError:
            continue


def _ranks() -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, (_, parent, _, session) = int(path.parent.name), path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):  # it has just ended
            continue
        if int(parent) == os.getpid() and int(session) == pid:
            yield pid


def _report(error: Any, own: Path) -> int:
    """Say which rank failed first and how, with the last lines it wrote; returns its exit code."""
    rank, failure = error.get_first_failure()
    died = failure.exitcode < 0
    code = 128 - failure.exitcode if died else failure.exitcode
    if code in [128 + number for number in interrupt.SIGNALS]:
        return code  # asked to stop, and said so itself
    how = f"died of {signal.Signals(-failure.exitcode).name}" if died else f"ended with exit code {code}"
    written = next(own.glob(f"*/attempt_*/{failure.local_rank}/stderr.log"), None)
    if lines := written.read_text(errors="replace").splitlines()[-_LAST_LINES:] if written else []:
        print(f"the last lines of rank {rank}:", *lines, sep="\n", file=sys.stderr)
    if died or code not in (1, 2):
        print(f"rank {rank} on {socket.gethostname()} {how}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
