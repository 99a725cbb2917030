"""What saving costs a training run, synchronous and asynchronous, and what a step costs beside its computing.

    python benchmarks/gpu_checkpoint.py hybrid_800m --folder DISK      # on one H200; meant to end within 8 minutes
    python benchmarks/gpu_checkpoint.py 'shrink(hybrid_800m)'          # anywhere, to try the script

Needs the kernels (`hybrid doctor`), 64 GiB of GPU memory and 40 GB on the disk of --folder for hybrid_800m. Each kind
of saving trains in a process of its own, on Python's standard library read from `.bin` files by the run's own loader,
and saves every few steps into --folder; the figures are those that metrics.jsonl has. A save that begins before the one
before it is whole waits for it, so the asynchronous ones are further apart. Of each run the first save is shown by
itself (it plans, and pins the memory that later ones use), and the last is left out (it always waits). The peer of the
asynchronous save is the synchronous one, and of both a plain file of the same size, written and synced.

Figures to reach on the H200 with hybrid_800m: an asynchronous save stalls the training at most 10% of the time of a
synchronous one; waiting for data takes under 1% of a step, everything that is not forward, backward and optimizer 2%.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Steps at the start that compile and warm up.
WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--saves", type=int, default=3, help="saves that are measured, besides the first and last")
    parser.add_argument("--every", type=int, default=8, help="steps between synchronous saves")
    parser.add_argument("--apart", type=int, default=40, help="steps between asynchronous saves: more than one takes")
    parser.add_argument("--folder", help="where the runs are written: on the disk that is to be measured")
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as where:
        runs = {kind: _train(kind, options, overrides, where) for kind in ("synchronous", "asynchronous")}
        size = runs["synchronous"]["saves"][0]["saved_gib"]
        plain = _write_plainly(Path(where) / "plain", size)
    print(f"{date.today()}, {_device()}, torch {version('torch')}, megatron-core {version('megatron-core')}")
    print(f"{' '.join([options.recipe, *overrides])}; a checkpoint has {size:.2f} GiB\n")
    print("| save | stall, s | first stall, s | until it is whole, s | GB/s | step while writing / otherwise, s |")
    print("|---|---|---|---|---|---|")
    stalls = {}
    for kind, run in runs.items():
        first, *measured, _ = run["saves"]
        stalls[kind] = statistics.median(save["save_stall_seconds"] for save in measured)
        whole = statistics.median(save["saved_seconds"] for save in measured)
        speed = f"{size * 2**30 / 1e9 / whole:.2f}"
        steps = f"{run['writing']:.3f} / {run['otherwise']:.3f}"
        print(f"| {kind} | {stalls[kind]:.3f} | {first['save_stall_seconds']:.3f} | {whole:.2f} | {speed} | {steps} |")
    print(f"| plain file, written and synced | | | {plain:.2f} | {size * 2**30 / 1e9 / plain:.2f} | |\n")
    print(f"asynchronous / synchronous stall: {stalls['asynchronous'] / stalls['synchronous']:.1%}")
    shares = runs["synchronous"]["shares"]
    print(
        f"of a step, median: waiting for data {shares['data']:.2%}, "
        f"all that is not forward, backward and optimizer {shares['beside']:.2%}"
    )


def _train(kind: str, options: argparse.Namespace, overrides: list[str], where: str) -> dict[str, Any]:
    every = options.apart if kind == "asynchronous" else options.every
    steps = (options.saves + 2) * every
    command = [
        *(sys.executable, "-m", "cli", "pretrain", options.recipe),
        *(
            "parallel=single",
            "data.source=stdlib",
            "data.path=None",
            "data.tokenizer=byte",
            "trainer.eval_interval=0",
            "trainer.eval_steps=1",
        ),
        *("optimizer.warmup_samples=0", "optimizer.decay_samples=None", f"trainer.max_steps={steps}"),
        *(f"checkpoint.save_interval={every}", "checkpoint.keep_last=1"),
        *(f"checkpoint.asynchronous={kind == 'asynchronous'}", f"name={kind}", f"folder={where}", *overrides),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(command, env=environment, cwd=where, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (Path(where) / kind / "metrics.jsonl").open()]
    shutil.rmtree(Path(where) / kind)
    steps_taken = [line for line in lines if "loss" in line and line["step"] > WARM_UP]
    saves = [line for line in lines if "saved_step" in line]
    for save in saves:
        print(kind, save, file=sys.stderr)
    # An asynchronous save is written in the steps from the one after it to the one at whose end it was found whole.
    under_way = {step for save in saves for step in range(save["saved_step"] + 1, save["step"] + 1)}
    writing = [line["step_seconds"] for line in steps_taken if line["step"] in under_way]
    otherwise = [line["step_seconds"] for line in steps_taken if line["step"] not in under_way]
    beside = {"data": ("data_seconds",), "beside": ("data_seconds", "other_seconds")}
    shares = {
        share: statistics.median(sum(line[phase] for phase in phases) / line["step_seconds"] for line in steps_taken)
        for share, phases in beside.items()
    }
    return {
        "saves": saves,
        "shares": shares,
        "writing": statistics.median(writing) if writing else float("nan"),
        "otherwise": statistics.median(otherwise) if otherwise else float("nan"),
    }


def _write_plainly(path: Path, gib: float) -> float:
    """Seconds that the disk takes for a file of this size."""
    block, left = os.urandom(2**24), int(gib * 2**30)
    began = time.monotonic()
    with path.open("wb") as file:
        while left > 0:
            left -= file.write(block[:left])
        file.flush()
        os.fsync(file.fileno())
    return time.monotonic() - began


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


if __name__ == "__main__":
    main()
