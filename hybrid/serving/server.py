"""Listening, and ending well."""

import errno
import multiprocessing
import signal
import socket
import sys
import threading
import time

import uvicorn

from hybrid.errors import ConfigError, Problem
from hybrid.generation.generator import Generator
from hybrid.serving.app import create_app
from hybrid.serving.limits import Limits
from hybrid.training.interrupt import SAME_SECONDS

_BACKLOG = 2048
_SECONDS_TO_READ = 5  # what a client has to take the rest of its text, once all are made


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        unknown = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        other = "--host" if unknown else "--port"
        said = f"{host} port {port} cannot be listened on ({error.strerror}); choose another"
        raise ConfigError(Problem(other, said)) from error
    return listening


def run(model: Generator, listening: socket.socket, limits: Limits, drain_seconds: int) -> None:
    """Serve until SIGTERM or SIGINT: then take nothing new, finish what is being made, and close the model.

    While texts are finished, others are refused with 503. A second signal ends the process at once, unless it comes so
    soon that a launcher has passed the first one on to a process that had it already.
    """
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        create_app(model, limits, drain_seconds),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_SECONDS_TO_READ,
        backlog=_BACKLOG,
    )
    server = uvicorn.Server(config)
    ending = 0.0  # since when

    def drain() -> None:
        model.close(drain_seconds)
        server.should_exit = True

    def end(number: int, _: object) -> None:
        nonlocal ending
        if ending and time.monotonic() - ending < SAME_SECONDS:
            return
        if ending:
            for rank in multiprocessing.active_children():
                rank.kill()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        ending = time.monotonic()
        texts = model.engine.running + model.engine.waiting
        if texts:
            print(f"finishing {texts} texts within {drain_seconds} s; once more ends at once", file=sys.stderr)
        threading.Thread(target=drain, name="drain").start()

    # Uvicorn's own would stop listening at once, end with the signal's exit code, and take no second SIGTERM.
    server.handle_exit = end  # type: ignore[method-assign]
    listening.listen(_BACKLOG)  # so that who comes as soon as this is said is not turned away
    print(f"{model.name} is served on http://{shown}:{port}", flush=True)
    try:
        server.run(sockets=[listening])
        print(f"{model.name} is no longer served", flush=True)
    finally:
        model.close(0)
