"""Where a run comes from: versions, machine, command, and the state of the code in git. Imports no torch."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

STARTS_FILE = "starts.jsonl"  # in a run's folder, a line a start
VERSIONS_FILE = "versions.json"  # in a checkpoint
# Counted up when an older version cannot read what a newer one writes.
FORMAT = 1

_PACKAGES = (
    "hybrid-recipes",
    "torch",
    "megatron-core",
    "transformer-engine",
    "mamba-ssm",
    "causal-conv1d",
    "numpy",
    "triton",
)
# Variables that change what a run computes or how fast; nothing else of the environment is written down.
_VARIABLES = ("CUDA_", "NCCL_", "GLOO_", "NVTE_", "OMP_", "PYTORCH_", "TORCH_", "TRITON_", "SLURM_JOB", "HYBRID_")


def versions() -> dict[str, Any]:
    """Versions of what wrote a checkpoint, or of where a run is sent from: those of packages that are there."""
    found: dict[str, Any] = {"format": FORMAT, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def start(processes: int, device: str) -> dict[str, Any]:
    """What is known about this start of a run."""
    return {
        "started": time.strftime("%FT%T%z"),
        "command": sys.argv,
        "machine": platform.node(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "processes": processes,
        "device": device,
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    }


def record(run: Path, processes: int, device: str) -> None:
    """Add a line about this start to the run's folder. Raises OSError if it cannot be written."""
    with (run / STARTS_FILE).open("a") as file:
        file.write(json.dumps(start(processes, device)) + "\n")


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and changed files of the repository that a folder is in; None if it is in none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.rstrip("\n")

    try:
        changed = [line[3:] for line in git("status", "--porcelain").splitlines()]
        return {
            "commit": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "changed": changed[:100],
        }
    except (OSError, subprocess.SubprocessError):
        return None
