"""Verbs about the runs so far."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import completion
from cli.describe import Json, print_json

if TYPE_CHECKING:
    from recipes.watching import State

Run = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Name of a run, or its folder.", autocompletion=completion.of("runs")),
]
Folder = Annotated[str, typer.Option("--folder", metavar="FOLDER", help="Folder of the runs.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.command("runs")(runs)
    app.command("status")(status)
    app.command("logs")(logs)
    app.command("cancel")(cancel)
    app.command("plot")(plot)


def runs(folder: Folder = "runs", as_json: Json = False) -> None:
    """List the runs there are, the newest first, and how they stand."""
    from recipes import records, sweeps, watching

    states = [watching.state(path) for path in records.folders(folder) if not sweeps.is_sweep(path)]
    if as_json:
        print_json([asdict(state) for state in states])
        return
    if not states:
        typer.echo(f"there are no runs in '{folder}' yet", err=True)
        return
    rows = [("run", "state", "step", "loss", "bits/byte", "tokens/s", "where", "")]
    rows += [(it.name, it.status, _step(it), _loss(it), _bits(it), _speed(it), it.kind, it.detail) for it in states]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for *row, note in rows:
        typer.echo("  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)), note]).rstrip())


def status(run: Run, folder: Folder = "runs", as_json: Json = False) -> None:
    """Say how a run stands, and if it failed, the last lines of the rank that did."""
    from recipes import records, sweeps, watching

    path = records.find(run, folder)
    if sweeps.is_sweep(path):
        rows = sweeps.rows(path)
        print_json([asdict(row) for row in rows]) if as_json else typer.echo(sweeps.table(rows))
        return
    state = watching.state(path)
    if as_json:
        print_json(asdict(state))
        return
    detail = f": {state.detail}" if state.detail else ""
    typer.echo(f"{state.name} is {state.status}{detail}")
    if state.step is not None:
        typer.echo(f"step {_step(state)}, loss {_loss(state)}")
    for line in state.measured():
        typer.echo(line)
    if len(state.jobs) > 1:
        for job in state.jobs:
            typer.echo(f"  job {job.identity}: {job.status}{f' ({job.detail})' if job.detail else ''}")
    for line in state.last_lines:
        typer.echo(f"  {line}")


def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    folder: Folder = "runs",
) -> None:
    """Print what a run writes; with -f until it ends, with its exit code."""
    from recipes import records, sweeps, watching

    path = records.find(run, folder)
    if follow:
        raise typer.Exit(sweeps.follow(path) if sweeps.is_sweep(path) else watching.follow(path))
    typer.echo(watching.log(path), nl=False)


def cancel(run: Run, folder: Folder = "runs") -> None:
    """Ask a run, or every run of a sweep, to save and stop."""
    from recipes import records, sweeps, watching

    path = records.find(run, folder)
    for one in sweeps.under_way(path) if sweeps.is_sweep(path) else [path]:
        typer.echo(watching.cancel(one))


def plot(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Names of runs, or their folders.", autocompletion=completion.of("runs")),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A .png or .html file; curves.png in the run.")
    ] = None,
    folder: Folder = "runs",
) -> None:
    """Draw the curves of one or several runs into one picture."""
    from recipes import curves, records

    paths = [records.find(run, folder) for run in runs]
    output = output or paths[0] / "curves.png"
    curves.draw([curves.read(path) for path in paths], output)
    typer.echo(f"drawn into {output}")


def _step(state: "State") -> str:
    return "" if state.step is None else f"{state.step}/{state.steps}" if state.steps else str(state.step)


def _loss(state: "State") -> str:
    return "" if state.loss is None else f"{state.loss:.4f}"


def _bits(state: "State") -> str:
    bits = next(iter(state.bits_per_byte.values()), None)
    return f"{bits:.3f}" if bits is not None else "nan" if state.bits_per_byte else ""


def _speed(state: "State") -> str:
    speed = state.metrics.get("tokens_per_second")
    return f"{speed:,.0f}" if speed else ""
