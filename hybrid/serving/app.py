"""The HTTP server: one model, the routes of OpenAI's and Megatron's clients, and a page to try it."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from hybrid.errors import ConfigError, UserError, nearest
from hybrid.generation.engine import Closed, QueueFull
from hybrid.generation.generator import Generator, UnknownModel
from hybrid.serving import megatron, openai, schemas, tokenizing
from hybrid.serving.limits import Guard, Limits, error
from hybrid.serving.metrics import Metrics

_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# What a misspelt field of a route may have meant.
_FIELDS = {
    "/v1/completions": schemas.CompletionRequest.model_fields,
    "/v1/chat/completions": schemas.ChatRequest.model_fields,
    "/api": megatron.ApiRequest.model_fields,
    "/tokenize": tokenizing.TokenizeRequest.model_fields,
    "/detokenize": tokenizing.DetokenizeRequest.model_fields,
}
# Pydantic's words where they are about Python.
_WORDS = {
    "none_required": "must be null",
    "model_attributes_type": "must be a JSON object",
    "dict_type": "must be a JSON object",
}
_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"


def create_app(model: Generator, limits: Limits | None = None, drain_seconds: float = 30) -> FastAPI:
    """The application. When it ends, it finishes what is being made within `drain_seconds`, and closes the model."""
    metrics = Metrics(model.engine)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        model.close(drain_seconds)

    app = FastAPI(
        title="hybrid-recipes", version=version("hybrid-recipes"), lifespan=life, redoc_url=None, docs_url=None
    )
    app.include_router(openai.router(model, metrics))
    app.include_router(megatron.router(model, metrics))
    app.include_router(tokenizing.router(model))
    _add_failures(app, metrics)

    @app.get("/health", responses={503: {"description": "The model has failed, or the server is ending."}})
    async def health() -> Response:
        """Whether the model can be asked."""
        state = "failed" if model.engine.failure is not None else "ending" if model.engine.closing else "ok"
        return JSONResponse({"status": state, "model": model.name}, 200 if state == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read_metrics() -> Response:
        """Counts, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    for path, (name, kind) in _PAGE.items():
        app.add_api_route(path, _file(name, kind), methods=["GET"], include_in_schema=False)
    app.openapi = _without_422(app)  # type: ignore[method-assign]
    app.add_middleware(Guard, limits=limits or Limits(), refused=lambda status: metrics.refused.labels(status).inc())
    return app


def _file(name: str, kind: str) -> Callable[[], Any]:
    content = files("hybrid.serving").joinpath("page", name).read_bytes()

    async def read() -> Response:
        return Response(content, media_type=kind, headers={"content-security-policy": _POLICY})

    return read


def _place(problem: Mapping[str, Any]) -> str:
    """The field that is wrong, as its sender knows it: of several types, pydantic names the one that was tried, too."""
    parts = problem["loc"][1:]  # the first is the body
    if problem["type"] == "extra_forbidden":  # whose last part is the sender's own
        return ".".join(str(part) for part in [*filter(_is_name, parts[:-1]), parts[-1]])
    return ".".join(str(part) for part in filter(_is_name, parts))


def _is_name(part: str | int) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "TextPart"))


def _add_failures(app: FastAPI, metrics: Metrics) -> None:
    """Failures with the right status, in the form of those who asked."""

    def answer(request: Request, status: int, message: str, kind: str, param: str | None = None) -> Response:
        metrics.refused.labels(status).inc()
        content = message if request.url.path == "/api" else error(message, kind, None, param)
        return openai.failure(status, content)

    async def invalid(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, RequestValidationError)
        if any(each["type"] == "json_invalid" for each in problem.errors()):
            return answer(request, 400, "the body is no JSON", "invalid_request_error")
        kind = request.headers.get("content-type", "")
        if not kind.startswith("application/json") and isinstance(problem.body, bytes):
            said = f"is '{kind}'" if kind else "is missing"
            return answer(request, 400, f"content-type {said}; send application/json", "invalid_request_error")
        messages, first = [], None
        fields = _FIELDS.get(request.url.path, {})
        for each in problem.errors():
            place = _place(each)
            first = first or place or None
            message = str(_WORDS.get(each["type"], each["msg"])).removeprefix("Value error, ")
            if each["type"] == "extra_forbidden":
                message = f"there is no such field{nearest(place, fields)}"
            messages.append(f"{place}: {message}" if place else f"the body: {message}")
        # A union says for each of its members why it is not that one.
        return answer(request, 400, "\n".join(dict.fromkeys(messages)), "invalid_request_error", first)

    async def wrong(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, UserError)
        if isinstance(problem, ConfigError):
            return answer(request, 400, str(problem), "invalid_request_error", problem.problems[0].place or None)
        for kind, status, name in (
            (QueueFull, 429, "rate_limit_error"),
            (Closed, 503, "server_error"),
            (UnknownModel, 404, "invalid_request_error"),
        ):
            if isinstance(problem, kind):
                return answer(request, status, str(problem), name)
        return answer(request, 500, str(problem), "server_error")

    async def http(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        response = answer(request, problem.status_code, str(problem.detail), "invalid_request_error")
        response.headers.update(problem.headers or {})
        return response

    async def failed(request: Request, problem: Exception) -> Response:
        return answer(request, 500, f"the server failed: {type(problem).__name__}", "server_error")

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(UserError, wrong)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)


def _without_422(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The schema as it is: what FastAPI would answer with 422 is answered with 400 here."""
    original = app.openapi

    def schema() -> dict[str, Any]:
        made = original()
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        return made

    return schema
