"""The tokenizer over HTTP, under the names that vLLM's clients know: lm-evaluation-harness counts tokens with it."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from hybrid.generation.generator import Generator
from hybrid.serving.openai import ERRORS
from hybrid.serving.schemas import Form, Text, Token

_END = "<|endoftext|>"  # how the end of a document is written where the tokenizer has no text for it


class TokenizeRequest(Form):
    """POST /tokenize. The text that `/tokenizer_info` gives for the end of a document becomes that token."""

    prompt: Text
    model: Text | None = None
    add_special_tokens: Literal[False] = False


class Tokenized(BaseModel):
    """A text's tokens."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(Form):
    """POST /detokenize."""

    tokens: list[Token]
    model: Text | None = None


class Detokenized(BaseModel):
    """A text."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What a client has to know of the tokenizer."""

    tokenizer_class: str
    vocab_size: int
    bos_token: None = None
    eos_token: str
    eos_token_id: int
    chat_template: str | None


def router(model: Generator) -> APIRouter:
    """The routes for one model."""
    routes = APIRouter(responses=ERRORS)
    tokenizer = model.tokenizer
    end = tokenizer.decode([tokenizer.eod]) or _END

    @routes.get("/tokenizer_info")
    async def info() -> TokenizerInfo:
        """The tokenizer's size and special tokens."""
        return TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=tokenizer.vocab_size,
            eos_token=end,
            eos_token_id=tokenizer.eod,
            chat_template=model.chat_template and model.chat_template.text,
        )

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        """The tokens of a text."""
        model.require(body.model)
        tokens = [tokenizer.eod] if body.prompt == end else model.encode(body.prompt)
        return Tokenized(tokens=tokens, count=len(tokens), max_model_len=model.engine.runner.room.max_length)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        """The text of some tokens."""
        model.require(body.model)
        model.engine.check_tokens(body.tokens)
        return Detokenized(prompt=tokenizer.decode(body.tokens))

    return routes
