"""Many short jobs of one, two or four processes in a single start of processes.

Starting a process costs more than most of the jobs: it imports torch and megatron-core. So four are started once, and
go through phases together; in a phase of jobs that take n processes they are 4 / n lanes, which share its jobs.

`python -m tests.lanes PLAN.json` is one of the four; tests start them under torchrun.
"""

import gc
import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import toy

WORKERS = 4


@dataclass(frozen=True)
class Phase:
    """Jobs of `processes` each: calls of the function `call`, as in "tests.toy:run", one for each of `arguments`.

    A phase begins when the one before has ended.
    """

    processes: int
    call: str
    arguments: list[dict[str, Any]]


def run(folder: Path, phases: list[Phase], timeout: float) -> None:
    """Go through the phases; fails if a job fails."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps([vars(phase) for phase in phases]))
    toy.spawn("tests.lanes", [str(plan)], WORKERS, timeout=timeout)


def _forget_models() -> None:
    """Let go of the models of the last job, and of the threads of its process groups.

    Autograd's hooks, which Python's collector does not see through, keep Megatron's DDP alive, and that the groups. A
    group of gloo's has threads that wake a hundred times a second: after some jobs they would take most of the machine.
    """
    from megatron.core.distributed import DistributedDataParallel

    for one in gc.get_objects():
        if type(one) is DistributedDataParallel:
            vars(one).clear()
    gc.collect()


def _main(plan: Path) -> None:
    import hybrid.quiet  # noqa: F401

    # isort: split
    import torch.distributed as dist

    store, worker, _ = next(dist.rendezvous("env://"))
    for number, phase in enumerate(Phase(**entry) for entry in json.loads(plan.read_text())):
        module, function = phase.call.split(":")
        call = getattr(importlib.import_module(module), function)
        lane, rank = divmod(worker, phase.processes)
        for job in range(lane, len(phase.arguments), WORKERS // phase.processes):
            size = phase.processes
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            os.environ["LOCAL_WORLD_SIZE"] = str(size)
            if size > 1:
                own = dist.PrefixStore(f"phase {number} job {job}", store)
                dist.init_process_group("gloo", store=own, rank=rank, world_size=size)
            call(**phase.arguments[job])
            _forget_models()
        store.add(f"phase {number}", 1)
        while store.add(f"phase {number}", 0) < WORKERS:
            time.sleep(0.05)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
