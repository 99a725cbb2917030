"""`python -m recipes.worker RECIPE.yaml`: one process of a run."""

import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from hybrid.errors import UserError
from hybrid.training import interrupt, provenance
from recipes import weights
from recipes.files import read_recipe

VERSIONS_FILE = "versions.json"  # beside the recipe: what the machine had that the recipe was sent from


def main(path: Path) -> int:
    """Run the recipe in a file as one rank; returns the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        if rank == 0:
            for line in differing_versions(path.parent / VERSIONS_FILE):
                print(line, flush=True)
        with interrupt.ends_at_once():
            weights.run(read_recipe(path))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception:
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
        return 1
    return 0


def differing_versions(path: Path) -> Iterator[str]:
    """Say what has another version here than where the recipe was sent from, one line each."""
    if not path.is_file():
        return
    sent, here = json.loads(path.read_text()), provenance.versions()
    for name in dict.fromkeys([*sent, *here]):
        there, own = sent.get(name, "none"), here.get(name, "none")
        if there != own:
            yield f"{name} is {own} here, and {there} where this run was sent from"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
