"""Between the server's event loop and the engine's thread."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fastapi import Request

from hybrid.errors import ConfigError
from hybrid.generation.generator import Completion, Generator, Prompt, broken_off
from hybrid.generation.sampling import Sampling
from hybrid.generation.text import Listener, Piece
from hybrid.serving.metrics import Metrics

_SHORT = 2**16  # characters that are taken apart in some milliseconds


class Asked:
    """Some texts that are being made. Iterate over (index, piece); `cancel` when nobody reads on."""

    def __init__(
        self,
        model: Generator,
        metrics: Metrics,
        route: str,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        n: int = 1,
    ):
        """Queue `n` texts for each prompt. Raises ConfigError, QueueFull or Closed. To be called in the event loop."""
        self._model, self._metrics, self._route = model, metrics, route
        self._loop = asyncio.get_running_loop()
        self._pieces: deque[tuple[int, Piece]] = deque()
        self._came = asyncio.Event()
        self._open = len(prompts) * n
        self._left = False  # whether the client has hung up
        self._started = time.monotonic()
        self._last: dict[int, float] = {}
        self.prompt_tokens = sum(map(len, prompts))
        model.engine.check_count(self._open)  # before all of them are made
        for prompt in prompts:
            model.engine.check(prompt, sampling)
        self._jobs = [
            model.job(prompt, sampling, self._listener(index * n + number), number)
            for index, prompt in enumerate(prompts)
            for number in range(n)
        ]
        model.engine.submit(*self._jobs)
        metrics.prompt_tokens.inc(self.prompt_tokens)

    def _listener(self, index: int) -> Listener:
        counted = 0

        def listen(piece: Piece) -> None:
            nonlocal counted
            # Counted here, since nobody takes the last pieces of who has hung up. What ends a text may have no piece.
            if piece.reason or not piece.echo:
                new = self._jobs[index].row.position - counted if piece.reason else 1
                counted += new
                self._metrics.tokens.inc(new)
            if piece.reason:
                self._metrics.requests.labels(self._route, piece.reason).inc()
                self._metrics.duration.observe(time.monotonic() - self._started)
            # Waking the loop costs more than a token: only the first piece after it has taken all others does.
            self._pieces.append((index, piece))
            if len(self._pieces) == 1 and not self._loop.is_closed():  # closed: the server is gone
                self._loop.call_soon_threadsafe(self._came.set)

        return listen

    def cancel(self) -> None:
        """End what is still being made."""
        self._model.engine.cancel(*self._jobs)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        while self._open:
            while not self._pieces:
                self._came.clear()
                if not self._pieces:  # what came since, before the event was cleared, wakes nobody
                    await self._came.wait()
            index, piece = self._pieces.popleft()
            self._note(index, piece)
            if piece.reason:
                self._open -= 1
            yield index, piece

    def _note(self, index: int, piece: Piece) -> None:
        if piece.reason or piece.echo:
            return
        now = time.monotonic()
        if index not in self._last:
            self._metrics.first_token.observe(now - self._started)
        else:
            self._metrics.next_token.observe(now - self._last[index])
        self._last[index] = now

    async def completions(self, request: Request) -> list[Completion]:
        """All texts, when they are finished; if the client hangs up, the slots are freed and what there is is given.

        Raises what `broken_off` says if one of them did not come to its end.
        """
        texts = [Completion() for _ in self._jobs]

        def leave() -> None:
            self._left = True
            self.cancel()

        watching = asyncio.create_task(_when_gone(request.receive, leave))
        try:
            async for index, piece in self:
                texts[index].add(piece)
        finally:
            watching.cancel()
            self.cancel()
        for text in texts:
            if not self._left and (error := broken_off(text.reason)):
                raise error
        return texts

    @property
    def generated(self) -> int:
        """Tokens that have been made, without those of an echoed prompt."""
        return sum(job.row.position for job in self._jobs)


async def encode(model: Generator, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The tokens of prompts. Long texts are taken apart in a thread, so that the others' go on meanwhile."""
    if sum(map(len, prompts)) < _SHORT:
        return [model.encode(prompt) for prompt in prompts]
    return await asyncio.to_thread(lambda: [model.encode(prompt) for prompt in prompts])


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Say what is wrong under the names of a route's fields: `names` has them by those of `Sampling`, and "prompt"."""
    try:
        yield
    except ConfigError as error:
        problems = [replace(each, place=names.get(each.place, each.place)) for each in error.problems]
        raise ConfigError(problems) from None


async def _when_gone(receive: Callable[[], Awaitable[Any]], then: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    then()
