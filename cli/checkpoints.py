"""Verbs for checkpoints of any origin: say what they are, and write them in another format or layout."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli import completion
from cli.describe import Json, print_json

Source = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A checkpoint of any format, a run, or FORMAT:PATH.",
        autocompletion=completion.of("checkpoints"),
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow-pickle", metavar="NAME", help="Read past this name in a pickle; nothing of it is run."),
]
Facts = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="What the checkpoint does not say, such as mamba_state_dim=128."),
]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.command("inspect")(inspect)
    app.command("convert")(convert)


def inspect(
    path: Source,
    known: Facts = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    other: Annotated[
        str | None, typer.Option("--diff", metavar="OTHER", help="Compare with another checkpoint, in any format.")
    ] = None,
    form: Annotated[
        Literal["text", "yaml"], typer.Option("--format", help="yaml: a recipe that show and plan take as @file.yaml.")
    ] = "text",
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Say what a checkpoint is: format, model, layout, number formats, sizes. Its weights are not read."""
    from converters import convert as converting
    from converters import summary

    checkpoint = converting.open_checkpoint(path, model_fields(known), allow or [])
    if other is not None:
        second = converting.open_checkpoint(other, model_fields(known), allow or [])
        found = list(summary.diff(checkpoint, second))
        if as_json:
            print_json([vars(difference) for difference in found])
        else:
            typer.echo("\n".join(map(str, found)) or "no difference")
        raise typer.Exit(1 if found else 0)
    if as_json:
        shapes = {name: [list(tensor.shape), tensor.dtype] for name, tensor in checkpoint.tensors.items()}
        print_json(summary.facts(checkpoint) | ({"shapes": shapes} if tensors else {}))
    elif form == "yaml":
        typer.echo(summary.recipe(checkpoint), nl=False)
    else:
        typer.echo(summary.text(checkpoint))
        for line in summary.tensor_lines(checkpoint) if tensors else []:
            typer.echo(line)


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A checkpoint of any format, a run, or FORMAT:PATH.",
            autocompletion=completion.of("checkpoints"),
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; it must not exist.")],
    known: Facts = None,
    to: Annotated[str, typer.Option(help="megatron (legacy), torch_dist, or hf.")] = "torch_dist",
    tensor: Annotated[int, typer.Option("--tensor-parallel", min=1, help="Tensor parallel size.")] = 1,
    pipeline: Annotated[int, typer.Option("--pipeline-parallel", min=1, help="Pipeline parallel size.")] = 1,
    expert: Annotated[int, typer.Option("--expert-parallel", min=1, help="Expert parallel size.")] = 1,
    layer_pattern: Annotated[
        str | None, typer.Option(help="The model's pattern with '|' where pipeline stages end; default: even stages.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="For hf: nemotron_h, mamba2, mamba, bamba, state_spaces; default: what fits.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; what needs float32 keeps it. Default: as it is.")
    ] = None,
    drop_mtp: Annotated[bool, typer.Option("--drop-mtp", help="Leave out multi-token prediction.")] = False,
    separate_norms: Annotated[
        bool, typer.Option("--separate-norms", help="For megatron: names of a model without transformer-engine.")
    ] = False,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Carry the optimizer's state over, too.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back and compare.")] = False,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another format or parallel layout, bit by bit the same weights.

    The destination appears when it is complete; the source is never touched.
    """
    from converters import convert as converting

    result = converting.convert(
        source,
        destination,
        to,
        tensor=tensor,
        pipeline=pipeline,
        expert=expert,
        layer_pattern=layer_pattern,
        family=family,
        dtype=dtype,
        drop_mtp=drop_mtp,
        fused_norms=not separate_norms,
        optimizer=optimizer,
        overrides=model_fields(known),
        allow=allow or [],
        verify=verify,
        report=_progress if sys.stderr.isatty() else None,
    )
    if as_json:
        facts = {"path": str(result.path), "format": result.format, "files": result.files, "bytes": result.nbytes}
        print_json(facts | {"verified": result.verified})
    else:
        typer.echo(str(result))


def model_fields(arguments: list[str] | None) -> dict[str, Any]:
    """Fields of the model from key=value, in the grammar of recipes; `model.` may be left out.

    Raises ConfigError with everything that is wrong in them.
    """
    from typing import get_type_hints

    from hybrid.config import ModelConfig
    from hybrid.errors import ConfigError, Problem, nearest
    from recipes import overrides, typed

    hints = get_type_hints(ModelConfig)
    result: dict[str, Any] = {}
    problems: list[Problem] = []
    for argument in arguments or []:
        try:
            override = overrides.parse(argument)
        except ConfigError as error:
            problems += error.problems
            continue
        name = override.key.removeprefix("model.")
        if name not in hints or override.operator != "=":
            message = f"is no field=value of the model{nearest(name, hints)}; `hybrid show` lists its fields"
            problems.append(Problem(argument, message))
            continue
        try:
            result[name] = typed.parse(override.value, hints[name])
        except ValueError as error:
            problems.append(Problem(name, str(error)))
    if problems:
        raise ConfigError(problems)
    return result


def _progress(progress: Any) -> None:
    done = progress.done == progress.total
    typer.echo(f"\r{progress}", err=True, nl=done)
