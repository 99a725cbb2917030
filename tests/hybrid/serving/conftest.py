"""A server with a toy model of random weights, in a thread of this process."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn

from hybrid.config import ModelConfig
from hybrid.data.chat_template import ChatTemplate
from hybrid.data.tokenizer import ByteTokenizer
from hybrid.generation.generator import Generator
from hybrid.generation.runner import Room, Runner
from hybrid.serving.app import create_app
from hybrid.serving.limits import Limits
from tests.hybrid.generation.toys import make_weights
from tests.toy import MODEL

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def make_generator(model: ModelConfig = MODEL, **room: Any) -> Generator:
    """A model with random weights that never ends a document by itself."""
    runner = Runner(make_weights(model), Room(**{"slots": 4, "max_length": 16384, **room}))
    made = Generator(runner, ByteTokenizer(), "toy", max_waiting=8, chat_template=ChatTemplate(TEMPLATE))
    made.engine.end = -1
    return made


@dataclass
class Served:
    """A running server: where it is, and what it serves."""

    url: str
    model: Generator
    server: uvicorn.Server

    def client(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **kwargs)

    def idle(self) -> bool:
        """Whether every slot becomes free within some seconds."""
        for _ in range(200):
            if not self.model.engine.running and not self.model.engine.waiting:
                return True
            time.sleep(0.05)
        return False


def serve(model: Generator, limits: Limits | None = None) -> Iterator[Served]:
    """Run the application on a free port of loopback."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(model, limits), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", model, server)
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server without a key."""
    yield from serve(make_generator())


@pytest.fixture(scope="module")
def guarded() -> Iterator[Served]:
    """A server with a key, and small limits."""
    yield from serve(make_generator(slots=1), Limits(key="secret", body_bytes=2000))
