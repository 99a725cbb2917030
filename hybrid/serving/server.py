"""Listening, and ending well."""

import socket

import uvicorn

from hybrid.errors import UserError
from hybrid.generation.generator import Generator
from hybrid.serving.app import create_app
from hybrid.serving.limits import Limits


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from error
    return listening


def run(model: Generator, listening: socket.socket, limits: Limits, drain_seconds: int) -> None:
    """Serve until SIGTERM or SIGINT: then take nothing new, finish what is being made, and close the model."""
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"{model.name} is served on http://{shown}:{port}", flush=True)
    config = uvicorn.Config(
        create_app(model, limits, drain_seconds),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=drain_seconds,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        model.close(0)
