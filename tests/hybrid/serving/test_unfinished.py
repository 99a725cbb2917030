"""Texts that the server's end cuts off: whoever waits for one hears so, and takes none for finished."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.hybrid.serving.conftest import Served, make_generator, serve

LONG = {"prompt": "a", "max_tokens": 16000, "ignore_eos": True}
SAYS = "the model is being closed, and the text was not finished in time"


@contextmanager
def _with_one_slot(**room: Any) -> Iterator[Served]:
    yield from serve(make_generator(slots=1, **room))


def _until(reached: Any) -> None:
    for _ in range(400):
        if reached():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/api"])
def test_a_text_that_is_cut_off_is_answered_with_503_whether_it_was_begun_or_waited(route: str) -> None:
    body = {
        "/v1/completions": LONG,
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 16000},
        "/api": {"prompts": ["a"], "tokens_to_generate": 16000},
    }[route]
    answers: list[Any] = []

    with _with_one_slot() as served:

        def ask() -> None:
            with served.client() as http:
                answers.append(http.request("PUT" if route == "/api" else "POST", route, json=body))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        _until(lambda: (served.model.engine.running, served.model.engine.waiting) == (1, 1))
        assert not served.model.close(0)
        for thread in threads:
            thread.join()
    assert [answer.status_code for answer in answers] == [503, 503]
    for answer in answers:
        assert (answer.json() if route == "/api" else answer.json()["error"]["message"]) == SAYS


def test_a_stream_that_is_cut_off_ends_with_an_error() -> None:
    with (
        _with_one_slot() as served,
        served.client() as http,
        http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer,
    ):
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        assert not served.model.close(0)
        last = list(lines)[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == SAYS
