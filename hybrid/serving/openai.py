"""The routes that OpenAI's clients speak."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from hybrid.generation.generator import Generator, broken_off
from hybrid.generation.text import Piece, TokenText, text_bytes
from hybrid.serving import schemas as form
from hybrid.serving.asking import Asked, encode, named
from hybrid.serving.metrics import Metrics

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": form.ErrorResponse, "description": "The request makes no sense, or asks for too much."},
    401: {"model": form.ErrorResponse, "description": "The API key is missing or wrong."},
    404: {"model": form.ErrorResponse, "description": "There is no such model."},
    413: {"model": form.ErrorResponse, "description": "The body is too long."},
    429: {"model": form.ErrorResponse, "description": "As many requests wait as may."},
    500: {"model": form.ErrorResponse, "description": "The model failed."},
    503: {"model": form.ErrorResponse, "description": "The server takes no more requests."},
}


def router(model: Generator, metrics: Metrics) -> APIRouter:
    """The routes for one model."""
    routes = APIRouter(responses=ERRORS)
    started = int(time.time())

    @routes.get("/v1/models")
    async def models() -> form.ModelList:
        """The one model that is served."""
        return form.ModelList(data=[entry()])

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str) -> form.ModelEntry:
        """What is known of a model."""
        model.require(name)
        return entry()

    def entry() -> form.ModelEntry:
        room = model.engine.runner.room
        return form.ModelEntry(id=model.name, created=started, max_length=room.max_length, chat=model.chats)

    @routes.post("/v1/completions", response_model=form.CompletionResponse)
    async def completions(body: form.CompletionRequest, request: Request) -> Any:
        """Texts that follow prompts; with `stream`, as server-sent events."""
        model.require(body.model)
        prompts = await encode(model, body.prompts())
        echo = bool(body.echo)
        most = 16 if body.max_tokens is None else body.max_tokens
        with named(body.names):
            sampling = body.sampling(most, logprobs=body.logprobs, echo=echo)
            asked = Asked(model, metrics, "completions", prompts, sampling, body.n or 1)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
        wanted = body.logprobs is not None
        if body.stream:

            def chunk(index: int, piece: Piece) -> BaseModel:
                scores = completion_logprobs(piece.tokens) if wanted else None
                choice = form.CompletionChoice(
                    index=index, text=piece.text, logprobs=scores, finish_reason=piece.reason
                )
                return form.CompletionResponse(**head, choices=[choice])

            usage = body.stream_options is not None and body.stream_options.include_usage
            last = (lambda: form.CompletionResponse(**head, choices=[], usage=_usage(asked))) if usage else None
            return _events(asked, chunk, last=last)
        texts = await asked.completions(request)
        choices = [
            form.CompletionChoice(
                index=i,
                text=text.text,
                logprobs=completion_logprobs(text.tokens) if wanted else None,
                finish_reason=text.reason,
            )
            for i, text in enumerate(texts)
        ]
        return form.CompletionResponse(**head, choices=choices, usage=_usage(asked))

    @routes.post("/v1/chat/completions", response_model=form.ChatResponse)
    async def chat(body: form.ChatRequest, request: Request) -> Any:
        """The assistant's next turn of a chat; with `stream`, as server-sent events."""
        model.require(body.model)
        prompt = model.chat(_plain(body.messages))
        most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        rest = max(1, model.engine.runner.room.max_length - len(prompt))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        with named(body.names):
            sampling = body.sampling(rest if most is None else most, logprobs=logprobs)
            asked = Asked(model, metrics, "chat", [prompt], sampling, body.n or 1)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}

        def scores(tokens: Sequence[TokenText]) -> form.ChatLogprobs | None:
            return chat_logprobs(tokens) if logprobs is not None else None

        if body.stream:

            def answer(index: int, delta: form.Answer, tokens: Sequence[TokenText], reason: str | None) -> BaseModel:
                choice = form.ChatChunkChoice(
                    index=index, delta=delta, logprobs=scores(tokens) if tokens else None, finish_reason=reason
                )
                return form.ChatChunk(**head, choices=[choice])

            def chunk(index: int, piece: Piece) -> BaseModel:
                return answer(index, form.Answer(content=piece.text), piece.tokens, piece.reason)

            first = [answer(i, form.Answer(role="assistant", content=""), [], None) for i in range(body.n or 1)]
            usage = body.stream_options is not None and body.stream_options.include_usage
            last = (lambda: form.ChatChunk(**head, choices=[], usage=_usage(asked))) if usage else None
            return _events(asked, chunk, first, last)
        texts = await asked.completions(request)
        choices = [
            form.ChatChoice(
                index=i,
                message=form.Answer(role="assistant", content=text.text),
                logprobs=scores(text.tokens),
                finish_reason=text.reason,
            )
            for i, text in enumerate(texts)
        ]
        return form.ChatResponse(**head, choices=choices, usage=_usage(asked))

    return routes


def completion_logprobs(tokens: Sequence[TokenText]) -> form.CompletionLogprobs:
    """Log-probabilities as /v1/completions has them. Of two likely tokens with the same text the likelier is given."""
    result = form.CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token in tokens:
        result.tokens.append(token.text)
        result.token_logprobs.append(token.logprob)
        likely = dict(reversed(token.top))
        result.top_logprobs.append(None if token.logprob is None else likely)
        result.text_offset.append(token.offset)
    return result


def chat_logprobs(tokens: Sequence[TokenText]) -> form.ChatLogprobs:
    """Log-probabilities as chats have them."""
    content = [
        form.ChosenLogprob(
            token=token.text,
            logprob=token.logprob or 0.0,
            bytes=text_bytes(token.text),
            top_logprobs=[
                form.TokenLogprob(token=text, logprob=value, bytes=text_bytes(text)) for text, value in token.top
            ],
        )
        for token in tokens
    ]
    return form.ChatLogprobs(content=content)


def _plain(messages: Sequence[form.Message]) -> list[dict[str, Any]]:
    """Messages as templates read them: contents as text."""
    result = []
    for message in messages:
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        result.append({"role": message.role, "content": text} | ({"name": message.name} if message.name else {}))
    return result


def _usage(asked: Asked) -> form.Usage:
    made = asked.generated
    return form.Usage(
        prompt_tokens=asked.prompt_tokens, completion_tokens=made, total_tokens=asked.prompt_tokens + made
    )


def _events(asked: Asked, chunk: Any, first: Sequence[BaseModel] = (), last: Any = None) -> StreamingResponse:
    """Pieces as server-sent events; ends the generation when the client hangs up."""

    async def events() -> AsyncIterator[str]:
        try:
            for one in first:
                yield _event(one)
            async for index, piece in asked:
                if error := broken_off(piece.reason):
                    failed = form.ErrorDetail(message=str(error), type="server_error")
                    yield _event(form.ErrorResponse(error=failed))
                    return
                if piece.text or piece.tokens or piece.reason:
                    yield _event(chunk(index, piece))
            if last is not None:
                yield _event(last())
            yield "data: [DONE]\n\n"
        finally:
            asked.cancel()

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _event(content: BaseModel) -> str:
    return f"data: {content.model_dump_json()}\n\n"


def failure(status: int, content: Any) -> JSONResponse:
    """A refusal."""
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse(content, status, headers)
