"""How long the describing verbs take from the shell to their last line, beside importing nemo-run.

    python benchmarks/startup.py [RUNS]

Prints a table for benchmarks/startup.md: median wall time, and the median of the CPU time that the process used, which
is what the wall time comes to on a machine that does nothing else. The verbs compute on one thread.
"""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

COMMANDS = {
    "hybrid --help": (["--help"], 0.4),
    "hybrid list": (["list"], 0.4),
    "hybrid show hybrid_8b": (["show", "hybrid_8b"], 0.8),
    "hybrid show hybrid_8b --format yaml": (["show", "hybrid_8b", "--format", "yaml"], 0.8),
    "hybrid diff hybrid_800m hybrid_8b": (["diff", "hybrid_800m", "hybrid_8b"], 0.8),
    "hybrid plan hybrid_8b": (["plan", "hybrid_8b"], 0.8),
    "hybrid plan nemotron_h_56b --gpus 1024 --search": (["plan", "nemotron_h_56b", "--gpus", "1024", "--search"], 10),
}


def measure(command: list[str], runs: int) -> tuple[float, float]:
    """Median seconds of the wall clock and of CPU time; the first run, which fills the disk cache, does not count."""
    walls, cpus = [], []
    for number in range(runs + 1):
        before, start = os.times(), time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        wall, after = time.perf_counter() - start, os.times()
        if number:
            walls.append(wall)
            cpus.append(after.children_user - before.children_user + after.children_system - before.children_system)
    return statistics.median(walls), statistics.median(cpus)


def main(runs: int) -> None:
    """Measure everything and print the table."""
    hybrid = str(Path(sys.executable).with_name("hybrid"))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("typer", "fiddle", "nemo-run"))
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    print(
        f"{date.today()}, {cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, {versions}; median of {runs}\n"
    )
    print("| command | goal (s) | wall (s) | CPU (s) |\n|---|---|---|---|")
    for name, (arguments, goal) in COMMANDS.items():
        wall, cpu_seconds = measure([hybrid, *arguments], runs)
        print(f"| `{name}` | {goal} | {wall:.2f} | {cpu_seconds:.2f} |")
    wall, cpu_seconds = measure([sys.executable, "-c", "import nemo_run"], max(1, runs // 3))
    print(f"| `import nemo_run` (the peer) | | {wall:.2f} | {cpu_seconds:.2f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
