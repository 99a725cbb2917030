"""Verbs that say what there is and what a recipe means, without torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli import completion

if TYPE_CHECKING:
    import fiddle as fdl

Reference = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A name, path/to/file.py:function, @file.yaml, or a run's folder.",
        autocompletion=completion.of("recipes"),
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides such as model.hidden_size=2048.",
        autocompletion=completion.of("overrides"),
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.command("list")(list_names)
    app.command("show")(show)
    app.command("diff")(diff)
    app.command("plan")(plan)


def list_names(
    what: Annotated[Literal["recipes", "models", "executors"], typer.Argument(help="What to list.")] = "recipes",
    as_json: Json = False,
) -> None:
    """List what there is, one line each."""
    if what == "models":
        _list_models(as_json)
        return
    if what == "executors":
        _list_executors(as_json)
        return
    from recipes import registry

    entries = registry.entries().values()
    if as_json:
        print_json([{"name": it.name, "summary": it.summary, "gpu": it.gpu, "gpus": it.gpus} for it in entries])
        return
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        typer.echo(f"{entry.name:<{width}}  {entry.machine:<9}  {entry.summary}")
    typer.echo(
        "\n'finetune(NAME)' fine-tunes one, 'shrink(NAME)' is a small one of the same shape for a trial run here"
    )


def _list_models(as_json: bool) -> None:
    from recipes import show as shown

    models = shown.models()
    if as_json:
        print_json(models)
        return
    width = max(len(model["name"]) for model in models)
    for model in models:
        layers = ", ".join(f"{count} {symbol}" for symbol, count in model["layers"].items())
        typer.echo(f"{model['name']:<{width}}  {model['parameters']:>14,}  hidden {model['hidden_size']:<5}  {layers}")


def _list_executors(as_json: bool) -> None:
    from recipes import profiles

    found = {name: profile.summary for name, profile in profiles.profiles().items()}
    if as_json:
        print_json([{"name": name, "summary": summary} for name, summary in found.items()])
        return
    width = max(map(len, found))
    for name, summary in found.items():
        typer.echo(f"{name:<{width}}  {summary}")
    typer.echo(f"\nyour own are in {profiles.path()}")


def show(
    reference: Reference,
    overrides: Overrides = None,
    form: Annotated[Literal["tree", "yaml", "python"], typer.Option("--format", help="How to print it.")] = "tree",
    origins: Annotated[
        bool, typer.Option("--origins", help="Say where each value was set, not what it means.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a whole recipe: every field with its value, its meaning and its unit.

    `--format yaml` prints a file that can be changed and given back as @file.yaml, `--format python` a function that
    can be given back as path/to/file.py:function.
    """
    from recipes import files, python
    from recipes import show as shown

    recipe = read_recipe(reference, overrides)
    if as_json:
        print_json(shown.facts(recipe, origins))
    elif form == "yaml":
        typer.echo(files.to_yaml(recipe), nl=False)
    elif form == "python":
        typer.echo(python.to_python(recipe), nl=False)
    else:
        typer.echo(shown.tree(recipe, paint, origins))


def diff(
    before: Annotated[
        str,
        typer.Argument(metavar="A", help="A recipe, as for `show`.", autocompletion=completion.of("recipes")),
    ],
    after: Annotated[str, typer.Argument(metavar="B", help="Another one.", autocompletion=completion.of("recipes"))],
    as_json: Json = False,
) -> None:
    """Show what differs between two recipes, field by field."""
    from recipes import resolve
    from recipes import show as shown

    old, new = resolve(before), resolve(after)
    if as_json:
        print_json({left.place: [left.value, right.value] for left, right in shown.diff(old, new)})
    else:
        typer.echo(shown.diff_text(old, new))


def plan(
    reference: Reference,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="GPU to plan for; by default the recipe's.")] = None,
    gpus: Annotated[int | None, typer.Option(help="How many; by default as many as the recipe is meant for.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Take this model FLOPs utilisation instead of predicting.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Look for layouts that fit, fastest first.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Write the plan as an SVG picture, too.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a recipe costs: checks, parameters, operations, memory, messages, time."""
    from recipes import plan_text, planning, registry

    recipe, machine = read_recipe(reference, overrides), registry.machine(reference)
    if search:
        found = planning.layouts(recipe, machine, gpu, gpus)
        print_json(found.as_dict()) if as_json else typer.echo(plan_text.search_text(found, paint))
        return
    planned = planning.plan(recipe, machine, gpu, gpus, mfu)
    if picture:
        from recipes import picture as drawing

        drawing.write(planned.plan, picture)
    print_json(planned.as_dict()) if as_json else typer.echo(plan_text.plan_text(planned, paint))


def read_recipe(reference: str, overrides: list[str] | None) -> "fdl.Partial[Any]":
    """Return the recipe that the words of a command mean."""
    from recipes import apply, resolve

    return apply(resolve(reference), overrides or [])


def paint(text: str, role: str) -> str:
    """Colour a piece of text by its role; typer takes colours out where the output is not a terminal."""
    styles = {"section": {"bold": True}, "default": {"dim": True}, "doc": {"dim": True}}
    return typer.style(text, **styles[role]) if role in styles else text


def print_json(facts: object) -> None:
    """Print facts as JSON on stdout."""
    import json

    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
