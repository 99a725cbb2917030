"""Speed and memory of a few training steps on one GPU, beside what `hybrid plan` predicts for them.

    python benchmarks/gpu_training.py [CASE ...] [--steps N]

Each case is a run of its own process on made-up data; the table at the end is for benchmarks/gpu.md. Tokens/s is that
of the median step after the first five (kernels are chosen and compiled in those), memory the largest ever allocated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
ONE_GPU = ["parallel=single", "data=mock", "trainer.eval_interval=0", "trainer.eval_steps=0"]
PRECISION_AWARE = ["optimizer.precision_aware=True"]
CASES: dict[str, tuple[str, list[str]]] = {
    "800m mbs 1": ("hybrid_800m", ["trainer.micro_batch_size=1", "trainer.global_batch_size=4"]),
    "800m mbs 4": ("hybrid_800m", ["trainer.micro_batch_size=4", "trainer.global_batch_size=8"]),
    "800m mbs 8": ("hybrid_800m", ["trainer.micro_batch_size=8", "trainer.global_batch_size=32"]),
    "800m mbs 8, full recompute": (
        "hybrid_800m",
        ["trainer.micro_batch_size=8", "trainer.global_batch_size=32", "trainer.recompute=full"],
    ),
    "800m mbs 8, FP8": (
        "hybrid_800m",
        ["trainer.micro_batch_size=8", "trainer.global_batch_size=32", "trainer.precision=fp8_current"],
    ),
    "8b mbs 1": ("hybrid_8b", ["trainer.micro_batch_size=1", "trainer.global_batch_size=8", *PRECISION_AWARE]),
    "8b mbs 1, FP8": (
        "hybrid_8b",
        [
            "trainer.micro_batch_size=1",
            "trainer.global_batch_size=8",
            "trainer.precision=fp8_current",
            *PRECISION_AWARE,
        ],
    ),
    "mamba-1 790m mbs 4": (
        "mamba_790m",
        ["trainer.micro_batch_size=4", "trainer.global_batch_size=8", "data.sequence_length=4096"],
    ),
}


def run(case: str, steps: int) -> None:
    """One case, in this process; the last line printed is its result as JSON."""
    name, overrides = CASES[case]
    from recipes import apply, resolve, settings

    with tempfile.TemporaryDirectory() as folder:
        recipe = apply(
            resolve(name),
            [
                *ONE_GPU,
                *overrides,
                f"folder={folder}",
                f"trainer.max_steps={steps}",
                "optimizer.warmup_samples=0",
                "optimizer.decay_samples=None",
                f"checkpoint.save_interval={10 * steps}",
            ],
        )
        built = settings(recipe)
        started = time.monotonic()
        from hybrid.training import loop

        loop.Saver.save = lambda *_, **__: []  # pyright: ignore[reportAttributeAccessIssue]: no part of this
        loop.train(built)
        whole = time.monotonic() - started
        lines = [json.loads(line) for line in (Path(folder) / built.name / "metrics.jsonl").open()]
    seconds = [line["step_seconds"] for line in lines if "step_seconds" in line]
    tokens = built.trainer.global_batch_size * built.data.sequence_length
    from hybrid.costs.plan import plan

    expected = plan(built, gpu="h200", world_size=1)
    median = statistics.median(seconds[5:] or seconds)
    result = {
        "tokens_per_second": tokens / median,
        "step_ms": median * 1e3,
        "first_step_s": seconds[0],
        "start_to_end_s": whole,
        "peak_gib": max(line["memory_gib"] for line in lines if "memory_gib" in line),
        "plan_gib": sum(astuple(expected.memory)) / 2**30,
        "plan_ms": expected.step.seconds * 1e3,
        "losses": [round(line["loss"], 4) for line in lines if "loss" in line][:: max(1, steps // 5)],
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--here", action="store_true")
    arguments = parser.parse_args()
    if arguments.here:
        run(arguments.cases[0], arguments.steps)
        return
    rows = []
    for case in arguments.cases:
        command = [sys.executable, __file__, case, "--here", "--steps", str(arguments.steps)]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"{case} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        print(case, json.dumps(row), flush=True)
        rows.append((case, row))
    import torch

    versions = {name: _version(name) for name in ("torch", "megatron-core", "transformer-engine", "mamba-ssm")}
    print(f"\n{date.today()}, {torch.cuda.get_device_name()}, {versions}\n")
    print("| case | tokens/s | step, ms | plan, ms | peak, GiB | plan, GiB | first step, s |")
    print("|---|---|---|---|---|---|---|")
    for case, row in rows:
        print(
            f"| {case} | {row['tokens_per_second']:,.0f} | {row['step_ms']:.0f} | {row['plan_ms']:.0f} | "
            f"{row['peak_gib']:.1f} | {row['plan_gib']:.1f} | {row['first_step_s']:.1f} |"
        )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    main()
