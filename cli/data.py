"""Verbs about training data."""

from typing import Annotated

import typer

from cli.describe import Json, print_json

app = typer.Typer(name="data", help="Prepare training data.", no_args_is_help=True)


def register(command: typer.Typer) -> None:
    """Add these verbs to the command."""
    command.add_typer(app)


@app.callback()
def data() -> None:
    """Prepare training data."""


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Files or folders: .jsonl, .parquet, others are text; .gz and .zst."),
    ],
    tokenizer: Annotated[
        str, typer.Option(help="'byte', a SentencePiece .model, a tokenizer.json or its folder, or a tiktoken .json.")
    ],
    output: Annotated[str, typer.Option(metavar="PREFIX", help="Write PREFIX.bin and PREFIX.idx.")],
    key: Annotated[str, typer.Option(help="JSON key or Parquet column of the text.")] = "text",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that encode; default: one a core.")] = None,
    as_json: Json = False,
) -> None:
    """Turn text, JSON lines or Parquet into Megatron's .bin/.idx files; the same command again goes on."""
    from hybrid.data.prepare_files import prepare_files
    from hybrid.data.tokenizer import load_tokenizer

    prepared = prepare_files(
        inputs,
        tokenizer=load_tokenizer(tokenizer, "--tokenizer"),
        output=output,
        key=key,
        workers=workers,
    )
    if as_json:
        print_json(prepared.facts())
    else:
        typer.echo(prepared)
