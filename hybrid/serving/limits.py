"""What is refused before a request is looked at: a wrong key, a body that is too long."""

import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/", "/health", "/page.css", "/page.js", "/openapi.json")
"""What needs no key: the page asks for one itself."""


@dataclass(frozen=True)
class Limits:
    """`key`: what clients have to send as `Authorization: Bearer KEY`, if anything. `body_bytes`: of one request."""

    key: str | None = None
    body_bytes: int = 4 << 20


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """A failure in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware; it does not buffer, so that streams and hang-ups pass through.

    `refused` is told the status of each refusal.
    """

    def __init__(self, app: ASGIApp, limits: Limits, refused: Callable[[int], None]):
        self._app, self._limits, self._refused = app, limits, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse with 401 or 413, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._limits.key is not None and scope["path"] not in OPEN and not self._knows(headers):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            await _read_out(receive, self._limits.body_bytes)
            await self._refuse(scope, send, 401, message, "authentication_error", "invalid_api_key")
            return
        most = self._limits.body_bytes
        too_long = f"the body is longer than {most:,} bytes"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            await _read_out(receive, 16 * most)
            await self._refuse(scope, send, 413, too_long, "invalid_request_error", "body_too_long")
            return
        read, more, begun = 0, True, False

        async def counted() -> Message:
            nonlocal read, more
            message = await receive()
            read += len(message.get("body", b""))
            more = message.get("more_body", False)
            if read > most:
                raise _TooLong
            return message

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, counted, sending)
        except _TooLong:
            if not begun:
                if more:
                    await _read_out(receive, 16 * most)
                await self._refuse(scope, send, 413, too_long, "invalid_request_error", "body_too_long")

    async def _refuse(self, scope: Scope, send: Send, status: int, message: str, kind: str, code: str) -> None:
        self._refused(status)
        content = message if scope["path"] == "/api" else error(message, kind, code)
        body = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        given = headers.get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self._limits.key}".encode())


async def _read_out(receive: Receive, most: int) -> None:
    """Drop what is still coming, up to `most` bytes: a client that is cut off while it sends may not see the answer."""
    read, more = 0, True
    while more and read <= most:
        message = await receive()
        read += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


class _TooLong(BaseException):
    """Not to be taken for a mistake of the application by anything in between."""
