"""A run on this machine: in this process, or in others under torchrun."""

import fcntl
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid import atomic
from hybrid.config import Settings
from hybrid.errors import ConfigError, UserError
from hybrid.training import folder as run_folder
from hybrid.training import interrupt
from recipes import plugins, records, watching, weights
from recipes.executors import Local
from recipes.records import Record
from recipes.registry import RECIPE_FILE
from recipes.staging import write_recipe

if TYPE_CHECKING:
    import fiddle as fdl

CONSOLE_FILE = "console.txt"  # what a detached run writes
_ENDED = f"{records.LOGS}/exit_local"


def launch(
    recipe: "fdl.Partial[Any]",
    built: Settings,
    executor: Local,
    count: int,
    *,
    detach: bool,
    dry_run: bool,
    own_process: bool = False,
) -> int:
    """Run a recipe in `count` processes; returns the exit code. A single one is this one, unless `own_process`."""
    run = Path(built.folder) / built.name
    around = plugins.arrange(built)
    variables = around.env | executor.env
    command = [*around.prefix, *_command(run, count)]
    if dry_run:
        print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command)]))
        return 0
    with _leaving_no_refused(run, keep=detach or own_process) as ended:
        write_recipe(recipe, run)
        with run_folder.writable(run):
            for name in around.folders:
                (run / name).mkdir(exist_ok=True)
        if count == 1 and not detach and not own_process and not around.prefix:
            os.environ.update(variables)
            if sys.stderr.isatty():
                print("loading PyTorch and megatron-core; the first time it may take half a minute", file=sys.stderr)
            ended.code = run_here(recipe, built)
        else:
            # One thread a process is torchrun's own default; share the cores out instead.
            threads = max(1, (os.cpu_count() or 1) // count)
            environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **variables}
            ended.code = _detach(command, environment, run) if detach else _wait(command, environment, run)
    return ended.code


def run_here(recipe: "fdl.Partial[Any]", built: Settings) -> int:
    """Run a recipe in this process, as the only one or as one of torchrun's."""
    run = Path(built.folder) / built.name
    if int(os.environ.get("RANK", "0")):
        weights.run(recipe)
        return 0
    write_recipe(recipe, run)
    with _starting(run):
        _remember(run, os.getpid(), log=run_folder.LOG_FILE)
    with _noting_the_end(run) as ended:
        ended.code = 1
        try:
            with interrupt.ends_at_once():
                weights.run(recipe)
            ended.code = 0
        except UserError as error:
            ended.code = error.exit_code
            raise
        except SystemExit as error:
            ended.code = error.code if isinstance(error.code, int) else 1
            raise
    return 0


def _command(run: Path, count: int) -> list[str]:
    worker = ["-m", "recipes.worker", str(run / RECIPE_FILE)]
    if count == 1:
        return [sys.executable, *worker]
    torchrun = ["-m", "recipes.torchrun", str(run / records.LOGS), "--standalone", "--nproc-per-node", str(count)]
    return [sys.executable, *torchrun, *worker]


@dataclass
class _Ended:
    code: int = 1


@contextmanager
def _starting(run: Path) -> Iterator[None]:
    """Let one process at a time start a run, and record that it goes on. Raises ConfigError if it does already."""
    with run_folder.writable(run):
        descriptor = os.open(run, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        watching.refuse_under_way(run)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _leaving_no_refused(run: Path, *, keep: bool) -> Iterator[_Ended]:
    """Remove the folder that this start has made of a run that was refused before its first step, unless `keep`.

    Why is said on the terminal. Who is not there to read it has the folder.
    """
    ended, made = _Ended(), [] if keep else _made(run)
    try:
        yield ended
    except UserError as error:
        ended.code = error.exit_code
        raise
    finally:
        metrics = run / run_folder.METRICS_FILE
        if made and ended.code == ConfigError.exit_code and not (metrics.is_file() and metrics.stat().st_size):
            shutil.rmtree(run, ignore_errors=True)
            with suppress(OSError):  # another run may be there by now
                for folder in made[1:]:
                    folder.rmdir()


def _made(run: Path) -> list[Path]:
    """Make a run's folder; returns it and those above it that were not there either; [] if it was there."""
    missing = [folder for folder in run.parents if not folder.exists()]
    with run_folder.writable(run):
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            return []
    return [run, *missing]


@contextmanager
def _noting_the_end(run: Path) -> Iterator[_Ended]:
    """Write down with what code a run ended."""
    ended = _Ended()
    try:
        yield ended
    finally:
        # On a full disk, what ended the run is what is to be said.
        with suppress(OSError):
            atomic.write_text(run / _ENDED, f"{ended.code}\n")


def _remember(run: Path, pid: int, log: str) -> None:
    record = Record(
        kind="local",
        name=run.name,
        run=str(run.absolute()),
        sent=time.strftime("%FT%T%z"),
        log=log,
        process=(pid, watching.process_start(pid)),
        machine=socket.gethostname(),
    )
    with run_folder.writable(run):
        (run / records.LOGS).mkdir(exist_ok=True)
        (run / _ENDED).unlink(missing_ok=True)
    records.write(record, run)


def _detach(command: list[str], environment: dict[str, str], run: Path) -> int:
    # A shell waits for the run and writes down how it ended; it takes no notice of what asks the run to stop.
    script = f'trap : TERM INT USR1; "$@"; code=$?; echo $code > {shlex.quote(str(run / _ENDED))}; exit $code'
    with _starting(run):
        with run_folder.writable(run), (run / CONSOLE_FILE).open("w") as output:
            process = subprocess.Popen(
                ["bash", "-c", script, "hybrid", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        _remember(run, process.pid, log=CONSOLE_FILE)
    print(f"{run.name} is started as process {process.pid}; `hybrid logs -f {run.name}` shows its output")
    return 0


def _wait(command: list[str], environment: dict[str, str], run: Path) -> int:
    with _starting(run):
        process = subprocess.Popen(command, env=environment)
        _remember(run, process.pid, log=run_folder.LOG_FILE)
    with _noting_the_end(run) as ended:
        while True:
            try:
                ended.code = process.wait()
                return ended.code
            except KeyboardInterrupt:
                # The terminal has sent it to the processes too: they save, and then this one ends with them.
                continue
