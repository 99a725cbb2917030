"""Verbs that train."""

from typing import Annotated

import typer

from cli import completion
from cli.describe import Overrides, Reference, read_recipe

Where = Annotated[
    str,
    typer.Option(
        "--executor",
        metavar="NAME",
        help="Where it runs: local, slurm, docker, or a profile of yours.",
        autocompletion=completion.of("executors"),
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print what would be started.")]
Detach = Annotated[bool, typer.Option("--detach", help="Return once the run has been started.")]
Repeat = Annotated[int, typer.Option(min=1, help="Jobs of a Slurm chain, each going on where the last stopped.")]
Sweep = Annotated[bool, typer.Option("--sweep", help="Run every combination of values that are parted by commas.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.command("pretrain")(pretrain)
    app.command("finetune")(finetune)


def pretrain(
    reference: Reference,
    overrides: Overrides = None,
    executor: Where = "local",
    dry_run: DryRun = False,
    detach: Detach = False,
    repeat: Repeat = 1,
    sweep: Sweep = False,
) -> None:
    """Train a model from random weights; the same command again goes on where it stopped.

    With --executor, overrides such as executor.nodes=4 say more about where.
    """
    raise typer.Exit(_start(reference, overrides or [], executor, dry_run, detach, repeat, sweep))


def finetune(
    reference: Reference,
    overrides: Overrides = None,
    executor: Where = "local",
    dry_run: DryRun = False,
    detach: Detach = False,
    repeat: Repeat = 1,
    sweep: Sweep = False,
) -> None:
    """Train a model from the weights of checkpoint=PATH; the same command again goes on where it stopped."""
    raise typer.Exit(_start(f"finetune({reference})", overrides or [], executor, dry_run, detach, repeat, sweep))


def _start(
    reference: str, overrides: list[str], executor: str, dry_run: bool, detach: bool, repeat: int, sweep: bool
) -> int:
    from recipes import profiles

    of_recipe, of_executor = profiles.split(overrides)
    where = profiles.executor(executor, of_executor)
    if sweep:
        from recipes import sweeps

        points = sweeps.expand(of_recipe)
        return sweeps.launch_sweep(
            points, lambda words: read_recipe(reference, words), where, detach=detach, dry_run=dry_run
        )
    recipe = read_recipe(reference, of_recipe)
    from recipes.launching import launch

    return launch(recipe, where, detach=detach, dry_run=dry_run, repeat=repeat)
