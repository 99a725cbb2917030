"""Verbs that make text with a trained model."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import completion
from cli.checkpoints import Allow, model_fields

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A run's name or folder, or a checkpoint of any format.",
        autocompletion=completion.of("checkpoints"),
    ),
]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="A tokenizer's file or folder, or 'byte'; default: the checkpoint's.")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: its own on a GPU, float32 on CPU.")
]
TensorParallel = Annotated[int, typer.Option("--tensor-parallel", min=1, help="Processes that share the model.")]
MaxLength = Annotated[int, typer.Option("--max-length", min=1, help="Positions of a sequence: prompt and text.")]
Invariant = Annotated[
    bool, typer.Option("--batch-invariant", help="On a GPU, too: a text does not depend on its batch. Slower.")
]
Known = Annotated[
    list[str] | None,
    typer.Option("--known", metavar="KEY=VALUE", help="What the checkpoint does not say, as for inspect."),
]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.command("generate")(generate)


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from; '-' reads it from stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to go on from.")] = None,
    batch: Annotated[
        Path | None,
        typer.Option(help="JSON lines, each with a prompt and settings of its own; '-' reads them from stdin."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="For --batch: JSON lines to write; default: stdout.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to make at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="Below 1 safer, above 1 wilder; 0: the likeliest.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this sum; 1: from all.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Leave out what has less than this share of the likeliest's.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that were there become rarer.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling; the same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends it; may be given several times.")] = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on past the end of a document.")] = False,
    tokenizer: TokenizerOption = None,
    dtype: Dtype = None,
    tensor_parallel: TensorParallel = 1,
    max_length: MaxLength = 4096,
    slots: Annotated[
        int | None, typer.Option(min=1, help="For --batch: texts that are made together; default: 32.")
    ] = None,
    batch_invariant: Invariant = False,
    known: Known = None,
    allow: Allow = None,
) -> None:
    """Go on from a prompt with a trained model; the text appears as it is made.

    With --batch, a line such as {"prompt": "def ", "seed": 1} becomes one with the text and why it ended.
    """
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
        "ignore_end": ignore_end,
    }
    from hybrid.generation import batches

    requests, text = [], ""
    if batch is None:
        _refuse_of_batches({"--output": output, "--slots": slots})
    if batch is not None:
        _one_source(prompt, prompt_file, batch)
        requests = batches.read(batch, settings)  # everything wrong with them is said before the model is loaded
        batches.refuse_output(output)
    else:
        text = _prompt(prompt, prompt_file)
        batches.check(text, settings)
    from recipes import open_generator

    with open_generator(
        checkpoint,
        tokenizer=tokenizer,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        max_length=max_length,
        slots=1 if batch is None else slots or 32,
        batch_invariant=batch_invariant,
        known=model_fields(known),
        allow=tuple(allow or ()),
    ) as model:
        if batch is not None:
            report = sys.stderr.isatty()
            batches.run(
                model, requests, output, (lambda line: typer.echo(f"\r{line}", err=True, nl=False)) if report else None
            )
            if report:
                typer.echo(err=True)
            return
        pieces = model.stream(text, **settings)
        typer.echo(text, nl=False)
        for piece in pieces:
            typer.echo(piece.text, nl=False)
        typer.echo()


def _refuse_of_batches(options: dict[str, Any]) -> None:
    from hybrid.errors import ConfigError, Problem

    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError([Problem(name, "is for --batch; give that, too, or leave it out") for name in given])


def _one_source(prompt: str | None, prompt_file: Path | None, batch: Path | None) -> None:
    from hybrid.errors import ConfigError, Problem

    given = [
        name
        for name, value in (("--prompt", prompt), ("--prompt-file", prompt_file), ("--batch", batch))
        if value is not None
    ]
    if len(given) > 1:
        raise ConfigError(Problem(given[1], f"is one source too many beside {given[0]}; give one of them"))


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from where it was said to be; from stdin if that is no terminal."""
    from hybrid.errors import ConfigError, Problem
    from hybrid.generation.batches import read_text

    _one_source(prompt, prompt_file, None)
    if prompt_file is not None:
        return read_text(prompt_file, "--prompt-file")
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        return read_text(Path("-"), "--prompt")
    if prompt is None:
        raise ConfigError(Problem("--prompt", "is missing: give a text, --prompt-file, --batch, or text on stdin"))
    return prompt
