"""What travels to a job: the recipe, the code that is running here, and the versions of what it runs on."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid import atomic
from hybrid.errors import UserError
from hybrid.training import provenance
from hybrid.training.folder import writable
from recipes import worker
from recipes.files import to_yaml
from recipes.registry import RECIPE_FILE

if TYPE_CHECKING:
    import fiddle as fdl

PACKAGES = ("hybrid", "recipes", "converters", "cli")


def stage(folder: Path, recipes: "list[fdl.Partial[Any]]") -> None:
    """Fill `folder` with one recipe, or those of a sweep by number, the code as it stands, committed or not, and its
    versions.

    A recipe is complete in its file, whatever file of the user's it was made by. Raises UserError if there is no room.
    """
    root = Path(__file__).parent.parent
    try:
        for number, recipe in enumerate(recipes, start=1):
            name = RECIPE_FILE if len(recipes) == 1 else f"recipe-{number}.yaml"
            (folder / name).write_text(to_yaml(recipe))
        (folder / worker.VERSIONS_FILE).write_text(json.dumps(provenance.versions(), indent=1) + "\n")
        for package in PACKAGES:
            shutil.copytree(root / package, folder / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise UserError(f"{folder}: what is to be sent cannot be written: {reason(error)}") from None


def reason(error: OSError) -> str:
    """The system's words for what went wrong; shutil.copytree gathers them file by file."""
    if isinstance(error, shutil.Error):
        why = str(error.args[0][0][2] if isinstance(error.args[0], list) else error)
        return why.partition("] ")[2].partition(": '")[0] or why
    return error.strerror or str(error)


def write_recipe(recipe: "fdl.Partial[Any]", run: Path) -> None:
    """Write a recipe into its run's folder, for whoever comes back to it. Raises UserError if it cannot be written."""
    with writable(run):
        run.mkdir(parents=True, exist_ok=True)
        atomic.write_text(run / RECIPE_FILE, to_yaml(recipe))
