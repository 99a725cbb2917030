"""Between the server's event loop and the engine's thread."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import Request

from hybrid.errors import UserError
from hybrid.generation.engine import Closed
from hybrid.generation.generator import Completion, Generator
from hybrid.generation.sampling import Sampling
from hybrid.generation.text import Listener, Piece
from hybrid.serving.metrics import Metrics


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
        self._jobs = [
            model.job(prompt, sampling, self._listener(index * n + number), number)
            for index, prompt in enumerate(prompts)
            for number in range(n)
        ]
        model.engine.submit(*self._jobs)
        metrics.prompt_tokens.inc(self.prompt_tokens)

    def _listener(self, index: int) -> Listener:
        def listen(piece: Piece) -> None:
            if piece.reason:  # counted here, since nobody takes the last piece of who has hung up
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
        self._metrics.tokens.inc()

    async def completions(self, request: Request) -> list[Completion]:
        """All texts, when they are finished; if the client hangs up, the slots are freed and what there is is given.

        Raises UserError or Closed if one of them did not come to its end.
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


def broken_off(reason: str | None) -> UserError | None:
    """What is to be answered instead of a text that did not come to its end."""
    if reason == "error":
        return UserError("the model failed while it was computing")
    if reason == "cancelled":
        return Closed("the server is ending, and the text was not finished in time")
    return None


async def _when_gone(receive: Callable[[], Awaitable[Any]], then: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    then()
