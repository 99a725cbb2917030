"""From `hybrid pretrain --executor slurm --detach` to the job's id, beside importing nemo-run.

    python benchmarks/slurm.py [RUNS]

Needs what tests/slurm needs: Slurm from Debian's packages, and root. Starts a cluster, sends jobs that are held, takes
them back. Prints a table for benchmarks/slurm.md: median wall time and median CPU time of the processes here.
"""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "slurm"))

import cluster as clusters  # noqa: E402

PLAIN = "import nemo_run"
# As it is imported here: without torch, which nemo-run imports for the sake of its dtypes.
OURS = "import sys; sys.modules['torch'] = None; import nemo_run"


def measure(command: list[str], environment: dict[str, str], folder: str) -> tuple[float, float]:
    """Seconds of the wall clock and of CPU time of one command."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, env=environment, cwd=folder, capture_output=True)
    wall, after = time.perf_counter() - start, os.times()
    return wall, after.children_user - before.children_user + after.children_system - before.children_system


def main(runs: int) -> None:
    """Measure the peers and the command in turn, and print the table."""
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, clusters.Cluster(Path(folder) / "cluster") as cluster:
        environment = {**os.environ, **cluster.environment, "PYTHONPATH": str(ROOT)}
        environment |= {"NEMORUN_HOME": str(Path(folder) / "nemo_run"), "OMP_NUM_THREADS": "1"}
        for number in range(runs + 1):
            words = ["pretrain", "tiny", f"name=run{number}", "--executor", "slurm", "executor.gpu_request=none"]
            send = [sys.executable, "-m", "cli", *words, "executor.sbatch={hold: ''}", "--detach"]
            commands = {
                "`hybrid pretrain --executor slurm --detach`, to the id": send,
                "`import nemo_run` without torch": [sys.executable, "-c", OURS],
                "`import nemo_run`": [sys.executable, "-c", PLAIN],
            }
            for name, command in commands.items():
                seconds = measure(command, environment, folder)
                if number:  # the first fills the disk's cache
                    found.setdefault(name, []).append(seconds)
        cluster.run("scancel", "--me")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    print(
        f"{date.today()}, {cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, nemo-run {importlib.metadata.version('nemo-run')}; median of {runs}\n"
    )
    print("| what | wall (s) | CPU (s) |\n|---|---|---|")
    for name, values in found.items():
        wall, cpu_seconds = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"| {name} | {wall:.2f} | {cpu_seconds:.2f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
