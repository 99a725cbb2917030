"""PUT /api, as the clients of Megatron-LM's text generation server speak it.

Every field is honoured or refused. A failure is a text, with a status that says so. `top_k` and `top_p` exclude each
other, 0 is no limit, and `top_k` 1 takes the likeliest token; `logprobs` are of the prompt's tokens after the first and
of the text's.
"""

import json
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from hybrid.errors import ConfigError, Problem
from hybrid.generation.generator import Generator
from hybrid.generation.sampling import Sampling
from hybrid.generation.text import token_text
from hybrid.serving.asking import Asked, encode, named
from hybrid.serving.metrics import Metrics
from hybrid.serving.schemas import Form, Text, Token

_NAMES = {"prompt": "prompts", "max_tokens": "tokens_to_generate", "stop_tokens": "stop_token"}
_REFUSED = {
    "top_p_decay": 0,
    "top_p_bound": 0,
    "prevent_newline_after_colon": False,
    "length_penalty": 1,
    "beam_width": None,
}
"""What this server does not do: the one value that it takes."""


class ApiRequest(Form):
    """What a client sends."""

    prompts: Annotated[list[Text], Field(min_length=1, max_length=128)]
    tokens_to_generate: Annotated[int, Field(ge=0)] = 64
    logprobs: bool = False
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    top_p_decay: float = Field(0.0, description="0 only")
    top_p_bound: float = Field(0.0, description="0 only")
    add_BOS: bool = Field(False, description="begin with the token that ends a document")
    stop_on_double_eol: bool = False
    stop_on_eol: bool = False
    prevent_newline_after_colon: bool = Field(False, description="false only")
    random_seed: Annotated[int, Field(ge=-1, lt=2**63)] = Field(-1, description="-1: another text every time")
    stop_token: Token | None = None
    length_penalty: float = Field(1.0, description="1 only")
    beam_width: int | None = Field(None, description="null only")

    def sampling(self) -> Sampling:
        """The settings of every text. Raises ConfigError for what is not done here."""
        problems = [
            Problem(name, f"is {json.dumps(getattr(self, name))}; this server takes {json.dumps(value)} only")
            for name, value in _REFUSED.items()
            if getattr(self, name) != value
        ]
        if self.top_k and self.top_p:
            problems.append(Problem("top_p", "cannot be set together with top_k"))
        if not self.tokens_to_generate and not self.logprobs:
            problems.append(Problem("tokens_to_generate", "is 0, which makes sense with logprobs only"))
        if problems:
            raise ConfigError(problems)
        return Sampling(
            max_tokens=self.tokens_to_generate,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p or 1.0,
            seed=None if self.random_seed == -1 else self.random_seed,
            stop=("\n",) if self.stop_on_eol else ("\n\n",) if self.stop_on_double_eol else (),
            stop_tokens=() if self.stop_token is None else (self.stop_token,),
            logprobs=0 if self.logprobs else None,
            echo=self.logprobs,
        )


def router(model: Generator, metrics: Metrics) -> APIRouter:
    """The route for one model."""
    refused = {status: {"model": str} for status in (400, 401, 413, 429, 500, 503)}
    routes = APIRouter(responses=refused)  # pyright: ignore[reportArgumentType]

    @routes.put("/api")
    async def api(body: ApiRequest, request: Request) -> dict[str, Any]:
        """Texts with their prompts, the tokens as texts, and log-probabilities if they are asked for."""
        start = [model.tokenizer.eod] if body.add_BOS else []
        with named(_NAMES):
            sampling = body.sampling()
            prompts = [start + prompt for prompt in await encode(model, body.prompts)]
            asked = Asked(model, metrics, "api", prompts, sampling)
        texts = await asked.completions(request)
        result: dict[str, Any] = {"text": [], "segments": [], "logprobs": None, "tokens": []}
        scores: list[list[float | None]] = []
        for prompt, ids, text in zip(body.prompts, prompts, texts, strict=True):
            made = [token.token for token in text.tokens]
            if body.logprobs and text.reason == "stop" and made[-1] in (model.tokenizer.eod, body.stop_token):
                made.pop()
            every = made if body.logprobs else ids + made
            result["text"].append(prompt + text.text[text.echoed :])
            result["tokens"].append(every)
            result["segments"].append(
                [token_text(model.tokenizer, every[max(0, i - 4) : i], token) for i, token in enumerate(every)]
            )
            scores.append([token.logprob for token in text.tokens][1 : len(every)])
        if body.logprobs:
            result["logprobs"] = scores
        return result

    return routes
