"""`python -m recipes.worker RECIPE.yaml`: one process of a run."""

import json
import os
import sys
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from platform import python_version

from hybrid.errors import UserError
from recipes import weights
from recipes.files import read_recipe

VERSIONS_FILE = "versions.json"  # beside the recipe: what the machine had that the recipe was sent from
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d", "fiddle")


def main(path: Path) -> int:
    """Run the recipe in a file as one rank; returns the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        if rank == 0:
            for line in differing_versions(path.parent / VERSIONS_FILE):
                print(line, flush=True)
        weights.run(read_recipe(path))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception:
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
        return 1
    return 0


def versions() -> dict[str, str]:
    """Versions of Python and of what a run's results may depend on; 'none' for a package that is not there."""
    found = {"python": python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def differing_versions(path: Path) -> Iterator[str]:
    """Say what has another version here than where the recipe was sent from, one line each."""
    if not path.is_file():
        return
    here = versions()
    for name, sent in json.loads(path.read_text()).items():
        if here.get(name) != sent:
            yield f"{name} is {here.get(name)} here, and {sent} where this run was sent from"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
