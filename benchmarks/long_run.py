"""Train a toy hybrid for 10,000 steps, and see whether its memory or its files grow.

    python benchmarks/long_run.py

Validation every 500 steps, an asynchronous checkpoint every 250, TensorBoard on: everything that could keep something.
Figure to reach: the resident memory of the last 1,000 steps is at most 1% above that of steps 1,000 to 2,000 (medians).
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hybrid.training.loop import train
from tests import toy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    tenth = steps // 10
    with tempfile.TemporaryDirectory() as where:
        run = toy.settings(
            Path(where),
            steps=steps,
            model={"layer_pattern": "M-*", "hidden_size": 16, "num_attention_heads": 2, "mamba_num_groups": 1},
            data={"sequence_length": 32},
            trainer={"eval_interval": 500, "log_to": ["tensorboard"], "micro_batch_size": 1, "global_batch_size": 1},
            checkpoint={"save_interval": 250, "asynchronous": True, "keep_last": 2},
        )
        began = time.monotonic()
        train(run)
        seconds = time.monotonic() - began
        folder = Path(run.folder) / run.name
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        size = {name: (folder / name).stat().st_size for name in ("metrics.jsonl", "log.txt")}
    memory = {line["step"]: line["memory_gib"] * 1024 for line in lines if "memory_gib" in line}
    medians = [
        statistics.median(memory[step] for step in range(first + 1, first + tenth + 1))
        for first in range(0, steps, tenth)
    ]
    growth = medians[-1] / medians[1] - 1
    print(f"{date.today()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}")
    print(f"{steps:,} steps in {seconds:.0f} s; resident memory in MiB, median of each tenth of the run:")
    print(", ".join(f"{median:.1f}" for median in medians))
    print(f"last tenth against the second: {growth:+.2%}")
    print(", ".join(f"{name} {bytes_ / 1024:.0f} KiB" for name, bytes_ in size.items()))
    return int(growth > 0.01)


if __name__ == "__main__":
    sys.exit(main())
