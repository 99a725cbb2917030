"""Kill a run again and again, and see whether it comes out as if nothing had happened.

    python benchmarks/kills.py --kills 100

A toy hybrid is trained by two processes over gloo. A random one of them gets SIGKILL at a random moment: while it
starts, in a step, while a checkpoint is written by it or beside it, while one is completed or an old one removed; the
other one follows a little later, as torchrun sees to. Then both are started again. Every second start saves
asynchronously.

Figures to reach: every start goes on from the newest checkpoint that was there when the one before was killed, no
checkpoint is damaged at any time, and every loss and gradient norm is that of a run that was never disturbed, bit for
bit. The exit code is 1 if one of them is not.

The processes are forked from one that has imported everything, so that a start takes less than a second.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from hybrid.config import Settings  # noqa: E402
from hybrid.training import checksums, folder  # noqa: E402
from tests import toy  # noqa: E402

PROCESSES = 2
SAVE_EVERY = 3
# Steps that a start may make before it is killed.
LONGEST = 7
# Seconds without progress that make a run one that does not go on.
PATIENCE = 300.0


@dataclass
class Tally:
    """What has been seen."""

    moments: Counter[str] = field(default_factory=Counter)
    went_on: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    began = time.monotonic()
    _import_everything()
    tally = Tally()
    with tempfile.TemporaryDirectory() as where:
        steps = 6 + options.kills * 4
        whole = _run(Path(where), "undisturbed", steps)
        ranks = _start(whole, where)
        for rank in ranks:
            assert os.waitpid(rank, 0)[1] == 0, _output(where)
        run, kills = _run(Path(where), "killed", steps), 0
        while True:
            run.checkpoint = replace(run.checkpoint, asynchronous=kills % 2 == 1)
            before = folder.latest_step(_checkpoints(run))
            ranks = _start(run, where)
            moment = _disturb(run, ranks, chance, before, where) if kills < options.kills else _wait(ranks)
            tally.went_on += _goes_on(where, before, tally, needs=moment != "start")
            _look_at(run, before, tally)
            if moment == "end":
                break
            tally.moments[moment] += 1
            kills += 1
        for key in ("loss", "grad_norm"):
            if toy.metrics(run, key) != toy.metrics(whole, key):
                tally.faults.append(f"{key} differs from the undisturbed run's")
        last = toy.metrics(run)[steps]
        said = f"final loss {last!r}, undisturbed {toy.metrics(whole)[steps]!r}"
    _print(options, tally, kills, steps, said, time.monotonic() - began)
    return 1 if tally.faults or kills < options.kills else 0


def _run(where: Path, name: str, steps: int) -> Settings:
    run = toy.settings(where, name, steps=steps, checkpoint={"save_interval": SAVE_EVERY, "keep_last": 2})
    run.checkpoint.keep_every = 10 * SAVE_EVERY
    return run


def _import_everything() -> None:
    warnings.filterwarnings("ignore", message="This process .* is multi-threaded", category=DeprecationWarning)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from hybrid.training import loop

    torch.set_num_threads(1)
    assert loop


def _start(run: Settings, where: str) -> list[int]:
    """Fork the ranks; returns their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    Path(where, "rank0.txt").write_text("")
    for rank in range(PROCESSES):
        process = os.fork()
        if process:
            ranks.append(process)
            continue
        os.setsid()
        output = os.open(f"{where}/rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = 1
        try:
            from hybrid.training.loop import train

            train(run)
            code = 0
        except BaseException as error:  # whatever it is, it must not go back into the parent's code
            print(repr(error), file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return ranks


def _disturb(run: Settings, ranks: list[int], chance: random.Random, before: int | None, where: str) -> str:
    """Kill both ranks, one after the other, at a random moment; returns when it was, "end" if the run was faster."""
    steps = chance.randrange(LONGEST + 1)
    in_save = chance.random() < 0.4
    deadline = time.monotonic() + PATIENCE
    # Until a start has begun to train, the files are those of the one before.
    while steps and not (_begun(where) and _recorded(run) >= (before or 0) + steps and (_saving(run) or not in_save)):
        if os.waitpid(ranks[0], os.WNOHANG)[0]:
            os.waitpid(ranks[1], 0)
            return "end"
        assert time.monotonic() < deadline, "the run does not go on"
        time.sleep(0.001)
    time.sleep(chance.random() * (0.02 if in_save and steps else 0.1 if steps else 1.5))
    moment = "start" if not _begun(where) else "save" if _saving(run) else "step"
    first = chance.randrange(PROCESSES)
    for rank in (ranks[first], ranks[1 - first]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
        time.sleep(chance.random() * 0.2)
    for rank in ranks:
        os.waitpid(rank, 0)
    return moment


def _wait(ranks: list[int]) -> str:
    for rank in ranks:
        os.waitpid(rank, 0)
    return "end"


def _goes_on(where: str, before: int | None, tally: Tally, *, needs: bool) -> bool:
    """Whether this start said that it goes on from where it should; a fault if it said anything else."""
    said = Path(where, "rank0.txt").read_text()
    if before is not None and f"goes on from step {before}\n" in said:
        return True
    if needs and before is not None:
        tally.faults.append(
            f"did not go on from step {before}: {said[-600:]}{Path(where, 'rank1.txt').read_text()[-600:]}"
        )
    return False


def _look_at(run: Settings, before: int | None, tally: Tally) -> None:
    """What a reader would find now."""
    there = folder.checkpoint_steps(_checkpoints(run))
    if before is not None and (not there or there[-1] < before):
        tally.faults.append(f"the checkpoint of step {before} is lost; there are {there}")
    for step in there:
        if damage := checksums.damage(folder.checkpoint_folder(_checkpoints(run), step)):
            tally.faults.append(f"the checkpoint of step {step} is damaged: {damage}")
    wanted = set(range(10 * SAVE_EVERY, (there or [0])[-1] + 1, 10 * SAVE_EVERY))
    if missing := wanted - set(there):
        tally.faults.append(f"checkpoints that are kept for good are missing: {sorted(missing)}")


def _checkpoints(run: Settings) -> Path:
    return Path(run.folder) / run.name / folder.CHECKPOINTS


def _begun(where: str) -> bool:
    """Whether this start has got as far as to train."""
    return "parameters; run folder" in Path(where, "rank0.txt").read_text()


def _saving(run: Settings) -> bool:
    return any(_checkpoints(run).glob(f"{folder.UNFINISHED}*"))


def _recorded(run: Settings) -> int:
    """The newest step in metrics.jsonl."""
    try:
        text = (Path(run.folder) / run.name / "metrics.jsonl").read_bytes()[-2000:]
    except FileNotFoundError:
        return 0
    for line in reversed(text.splitlines()):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def _output(where: str) -> str:
    return "\n".join(Path(where, f"rank{rank}.txt").read_text()[-3000:] for rank in range(PROCESSES))


def _print(options: Any, tally: Tally, kills: int, steps: int, said: str, seconds: float) -> None:
    print(f"{date.today()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(f"torch {version('torch')}, megatron-core {version('megatron-core')}, seed {options.seed}")
    print(f"{kills} kills in a run of {steps} steps on {PROCESSES} processes, {seconds:.0f} s")
    print("the kill came: " + ", ".join(f"{count} in a {moment}" for moment, count in tally.moments.most_common()))
    print(f"starts that got as far as to train, and went on from the newest checkpoint: {tally.went_on}")
    print(said)
    print("\n".join(["faults:", *tally.faults]) if tally.faults else "no checkpoint lost or damaged, every loss equal")


if __name__ == "__main__":
    sys.exit(main())
