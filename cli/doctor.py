"""The verb that says what this machine has and lacks."""

import typer

from cli.describe import Json, print_json


def register(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command("doctor")(doctor)


def doctor(as_json: Json = False) -> None:
    """Say what this machine has and lacks, which kernels a model takes here and why, and what to do about it."""
    import hybrid.quiet  # noqa: F401
    from hybrid.doctor import examine

    found = examine()
    print_json(found.as_dict()) if as_json else typer.echo(found.text())
    if not found.healthy:
        raise typer.Exit(1)
