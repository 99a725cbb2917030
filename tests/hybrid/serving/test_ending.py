"""How a server ends: the real command in a process of its own, with texts on their way."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from hybrid.training.interrupt import SAME_SECONDS
from tests import toy
from tests.converters.conftest import random_weights, save_legacy, small_model

LONG = {"prompt": "def ", "max_tokens": 3000, "ignore_eos": True, "stream": True, "seed": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_model("hybrid", vocab_size=257, vocab_size_multiple=8)
    weights = {name: tensor * 0.2 for name, tensor in random_weights(model, dtype=torch.float32).items()}
    return save_legacy(tmp_path_factory.mktemp("served"), model, weights)


@contextmanager
def _serve(checkpoint: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `hybrid serve`, in a process group of its own, and its address."""
    command = [
        str(Path(sys.executable).with_name("hybrid")),
        "serve",
        str(checkpoint),
        "--tokenizer",
        "byte",
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, "--drain", "60", *options],
        cwd=toy.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().split()[-1]
    process.kill()
    process.wait()


@pytest.fixture
def server(checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with _serve(checkpoint) as started:
        yield started


def _stream(url: str, lines: list[str]) -> None:
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
            lines += [line for line in answer.iter_lines() if line]
    except httpx.HTTPError as error:
        lines.append(repr(error))


def _wait(url: str, path: str, reached: Callable[[httpx.Response], bool]) -> httpx.Response:
    with httpx.Client(base_url=url) as http:
        for _ in range(600):
            if reached(answer := http.get(path)):
                return answer
            time.sleep(0.05)
    raise AssertionError(answer.text)


def _begun(url: str, count: int) -> list[tuple[threading.Thread, list[str]]]:
    """Some streams, each of which has begun."""
    texts: list[list[str]] = [[] for _ in range(count)]
    threads = [threading.Thread(target=_stream, args=(url, lines)) for lines in texts]
    for thread in threads:
        thread.start()
    _wait(url, "metrics", lambda answer: f"hybrid_running {count}.0" in answer.text)
    return list(zip(threads, texts, strict=True))


@pytest.mark.slow
def test_after_sigterm_texts_are_finished_and_others_refused(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    streams = _begun(url, 3)
    process.send_signal(signal.SIGTERM)
    health = _wait(url, "health", lambda answer: answer.status_code != 200)
    assert health.json()["status"] == "ending"
    refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == "the model is not taking requests any more"
    for thread, lines in streams:
        thread.join()
        assert lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2]
    assert process.wait(10) == 0
    assert process.stderr is not None
    assert process.stderr.read() == "finishing 3 texts within 60 s; once more ends at once\n"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sigterm_to_all_ranks_is_the_first_ones_to_answer(checkpoint: Path) -> None:
    with _serve(checkpoint, "--tensor-parallel", "2", "--drain", "600") as (process, url):
        ((thread, lines),) = _begun(url, 1)
        os.killpg(process.pid, signal.SIGTERM)
        thread.join()
        assert lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2]
        assert process.wait(10) == 0


@pytest.mark.slow
def test_a_second_sigterm_ends_it_at_once(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    ((thread, lines),) = _begun(url, 1)
    process.send_signal(signal.SIGTERM)
    _wait(url, "health", lambda answer: answer.status_code != 200)
    process.send_signal(signal.SIGTERM)  # as a launcher passes it on
    time.sleep(SAME_SECONDS)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == -signal.SIGTERM
    thread.join()
    assert lines[-1] != "data: [DONE]"


@pytest.mark.slow
def test_without_texts_it_ends_right_away(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    assert httpx.get(f"{url}/health").json()["status"] == "ok"
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 0
    assert process.stderr is not None and process.stderr.read() == ""
    assert process.stdout is not None and process.stdout.read().endswith(" is no longer served\n")
