"""Verbs that make text with a trained model."""

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.command("generate")(generate)


def generate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or the folder of a run.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to make at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Below 1 safer, above 1 wilder; 0: the likeliest.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this sum; 1: from all."),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling; the same seed gives the same text.")] = None,
) -> None:
    """Go on from a prompt with a trained model; the text appears as it is made."""
    from hybrid.generation.generate import stream_text

    pieces = stream_text(
        checkpoint,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    typer.echo(prompt, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()
