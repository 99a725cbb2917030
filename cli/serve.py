"""The verb that serves a model over HTTP."""

import math
from pathlib import Path
from typing import Annotated

import typer

from cli.checkpoints import Allow, model_fields
from cli.text import Checkpoint, Dtype, Invariant, Known, MaxLength, TensorParallel, TokenizerOption


def register(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command("serve")(serve)


def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="HYBRID_API_KEY", help="Clients must send it as 'Authorization: Bearer KEY'.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: the run's name.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Texts that are made together; others wait.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; more are refused with 429.")] = 256,
    body_mib: Annotated[float, typer.Option(min=0.001, help="Size of a request's body at most, in MiB.")] = 4.0,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that texts may take after SIGTERM to be finished.")] = 30,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens of a prompt read between two steps.")] = 256,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file; default: the tokenizer's own.")] = None,
    tokenizer: TokenizerOption = None,
    dtype: Dtype = None,
    tensor_parallel: TensorParallel = 1,
    max_length: MaxLength = 4096,
    batch_invariant: Invariant = False,
    known: Known = None,
    allow: Allow = None,
) -> None:
    """Serve a trained model: OpenAI's and Megatron's routes, metrics, and a page to try it."""
    from converters.convert import open_checkpoint
    from hybrid.errors import ConfigError, Problem
    from hybrid.generation.batches import read_text
    from hybrid.serving.limits import Limits
    from hybrid.serving.server import listen, run
    from recipes import open_generator

    if not math.isfinite(body_mib):
        raise ConfigError(Problem("--body-mib", f"is {body_mib}; give a number of MiB"))
    template = None if chat_template is None else read_text(chat_template, "--chat-template")
    fields, names = model_fields(known), tuple(allow or ())
    if not Path(checkpoint).exists():
        open_checkpoint(checkpoint, fields, names)  # a misspelt name is said before a port that is taken
    socket = listen(host, port)  # and that before the model is loaded
    model = open_generator(
        checkpoint,
        max_waiting=queue,
        tokenizer=tokenizer,
        chat_template=template,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        slots=slots,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
        batch_invariant=batch_invariant,
        known=fields,
        allow=names,
    )
    model.name = name or model.name
    run(model, socket, Limits(api_key, int(body_mib * 2**20)), drain)
