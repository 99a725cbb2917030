"""Train `tiny` as a newcomer does, and say how long it took, how far the loss fell and how much memory it held.

    python benchmarks/tiny.py

Figures to reach, on two cores: at most 180 s from the first step to the last, at most 2.9 bits per byte on held-out
files (a byte drawn evenly costs 8.0), a peak below 3 GiB. The peer is zlib at level 9 on the same held-out bytes: what
an algorithm that has seen no other file makes of them.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "cli", "pretrain", "tiny", "data.cache=cache"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
        )
        whole = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        lines = [json.loads(line) for line in (Path(folder) / "runs/tiny/metrics.jsonl").open()]
        log = (Path(folder) / "runs/tiny/log.txt").read_text()
        held_out = _held_out_bytes(Path(folder) / "cache")
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "validation_bits_per_byte" in line]
    seconds = _clock(log, "run folder", "done:")
    deflated = len(zlib.compress(held_out, 9)) * 8 / len(held_out)
    print(f"\n{date.today()}, {os.cpu_count()} cores of {_processor()}, Python {platform.python_version()}, ", end="")
    print(f"torch {version('torch')}, megatron-core {version('megatron-core')}")
    counted = next(line for line in log.splitlines() if "parameters" in line)
    print(f"model: {counted.split(' ', 2)[2].split(';')[0]}")
    print(f"steps: {len(steps)}; from before the first step to the last line {seconds} s; whole command {whole:.0f} s")
    print(f"tokens/s, median step: {np.median([step['tokens_per_second'] for step in steps]):,.0f}")
    print(f"peak resident memory: {peak:.2f} GiB")
    marks = [1, 10, 50, 100, 250, len(steps)]
    print("loss: " + ", ".join(f"{steps[mark - 1]['loss']:.3f} at step {mark}" for mark in marks))
    for line in validations:
        print(f"held-out files after step {line['step']}: {line['validation_bits_per_byte']:.3f} bits per byte")
    print(f"zlib -9 on the same {len(held_out):,} held-out bytes: {deflated:.3f} bits per byte")


def _held_out_bytes(cache: Path) -> bytes:
    tokens = np.concatenate([np.fromfile(path, np.uint16) for path in sorted(cache.glob("corpora/*/validation*.bin"))])
    return tokens[tokens < 256].astype(np.uint8).tobytes()


def _clock(log: str, first: str, last: str) -> int:
    """Seconds between two lines of log.txt."""

    def at(mark: str) -> float:
        line = next(line for line in log.splitlines() if mark in line)
        return time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S"))

    return round(at(last) - at(first))


def _processor() -> str:
    names = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
