"""The `hybrid` command: words in, calls, words out."""

import os
import sys
from typing import Annotated, Any

import typer

from cli import checkpoints, data, describe, doctor, runs, serve, text, train
from cli.help import Grouped
from hybrid.errors import UserError

app = typer.Typer(
    name="hybrid",
    cls=Grouped,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: readable everywhere, and rich is not imported for it
    pretty_exceptions_enable=False,
)
for group in (describe, train, runs, data, checkpoints, text, serve, doctor):
    group.register(app)


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> None:
    """Train, inspect and run hybrid Mamba-Transformer language models from declarative recipes."""


def run(arguments: list[str] | None = None) -> None:
    """Run the command and leave the process: 0 done, 1 failed, 2 usage or config error, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Read here and not by typer: it is wanted also for what fails before a verb runs, and may stand at the end.
    debug = "--debug" in (arguments[:1] + arguments[-1:])
    if arguments[-1:] == ["--debug"]:
        arguments = arguments[:-1]
    try:
        code: Any = app(arguments, standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:
        code = _report(error, debug)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception, debug: bool) -> int:
    """Say on stderr what went wrong; return the exit code."""
    if isinstance(error, BrokenPipeError):  # `hybrid list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, typer.Abort):
        print("aborted", file=sys.stderr)
        return 1
    if isinstance(error, UserError):
        print(error, file=sys.stderr)
        return error.exit_code
    usage_code = getattr(error, "exit_code", None)  # typer's own errors, whose classes are not public
    if usage_code is not None and hasattr(error, "format_message"):
        option = getattr(error, "option_name", "")
        said = _no_option(option, error) if option else error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        print(said, file=sys.stderr)
        if context := getattr(error, "ctx", None):
            print(f"`{context.command_path} --help` says how it is used", file=sys.stderr)
        return usage_code
    print(
        f"hybrid failed: {type(error).__name__}: {error}\nthe same command with --debug at its end shows where",
        file=sys.stderr,
    )
    return 1


def _no_option(option: str, error: Any) -> str:
    """Say that a verb has no such option, and what was meant: an option, a field of the recipe, another verb's."""
    from recipes import completing

    verbs, verb = error.ctx.find_root().command.commands, error.ctx.command
    others = [name for name, other in verbs.items() if any(option in one.opts for one in other.params)]
    options = [one for one in error.possibilities or [] if one != "--help"]
    takes_fields = any(one.name == "overrides" for one in verb.params)
    if takes_fields and (key := completing.meant(option, near=not (options or others))):
        hint = f"; a field is set without dashes: {key}=..."
    elif options:
        hint = f"; did you mean {options[0]}?"
    else:
        hint = f"; {', '.join(others)} {'have' if len(others) > 1 else 'has'} it" if others else ""
    return f"No such option: {option}{hint}"
