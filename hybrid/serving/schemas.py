"""Requests and responses as OpenAI's clients write and read them, and what of them this server takes.

Fields of OpenAI's that would change the text and are not there are refused by name, never ignored. `top_k`, `min_p`,
`repetition_penalty`, `stop_token_ids` and `ignore_eos` are additions that other servers have under these names.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hybrid.errors import ConfigError, Problem
from hybrid.generation.sampling import Sampling
from hybrid.generation.text import is_whole

MOST_TEXTS = 128
Token = Annotated[int, Field(ge=0, lt=2**31)]


def _whole(text: str) -> str:
    if not is_whole(text):
        raise ValueError("holds half of a character, which is no text in UTF-8")
    return text


Text = Annotated[str, AfterValidator(_whole)]
"""JSON can write half of a pair of surrogates; no answer can."""


def _zero(value: float) -> float:
    if value != 0:
        raise ValueError("is not done here; leave it out, or give 0")
    return value


def _empty(value: dict[str, float]) -> dict[str, float]:
    if value:
        raise ValueError("is not done here; leave it out, or give {}")
    return value


Zero = Annotated[float, AfterValidator(_zero), Field(json_schema_extra={"minimum": 0, "maximum": 0})]


class Form(BaseModel):
    """A request: unknown fields and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Form):
    """`include_usage`: a last chunk with the counts of tokens."""

    include_usage: bool = False


class Common(Form):
    """What completions and chats have in common."""

    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | list[Text] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stop_token_ids: list[Token] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: (
        Annotated[dict[str, float], AfterValidator(_empty), Field(json_schema_extra={"maxProperties": 0})] | None
    ) = None
    user: str | None = Field(None, description="taken, and not used")

    @property
    def names(self) -> dict[str, str]:
        """Its fields by the names that settings have elsewhere, where they differ."""
        return {"stop_tokens": "stop_token_ids"}

    def contradictions(self) -> list[Problem]:
        """Fields that mean nothing beside the others."""
        unread = self.stream_options is not None and not self.stream
        return [Problem("stream_options", "says nothing without stream: true; leave it out")] if unread else []

    def sampling(self, max_tokens: int, **more: Any) -> Sampling:
        """The settings of one text. Raises ConfigError for fields that contradict each other."""
        if problems := self.contradictions():
            raise ConfigError(problems)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=self.seed,
            stop=tuple(stop or ()),
            stop_tokens=tuple(self.stop_token_ids or ()),
            ignore_end=bool(self.ignore_eos),
            **more,
        )


class CompletionRequest(Common):
    """POST /v1/completions. A prompt is a text, tokens, or a list of either."""

    prompt: Text | list[Token] | list[Text] | list[list[Token]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = Field(None, description="as n only")
    suffix: None = Field(None, description="there is no filling in")

    def prompts(self) -> list[str | list[int]]:
        """One prompt an entry. Raises ConfigError if there are none or too many texts."""
        given: Any = self.prompt
        one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        prompts: list[Any] = [given] if one else list(given)
        texts = len(prompts) * (self.n or 1)
        if not prompts:
            raise ConfigError(Problem("prompt", "is empty; give the text to go on from"))
        if texts > MOST_TEXTS:
            raise ConfigError(Problem("prompt", f"asks for {texts} texts; one request may have {MOST_TEXTS}"))
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ConfigError(Problem("best_of", f"is {self.best_of} and n is {self.n or 1}; they must be the same"))
        return prompts


class TextPart(Form):
    """A part of a message; there are only texts."""

    type: Literal["text"]
    text: Text


class Message(Form):
    """One turn of a chat."""

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Text | list[TextPart]
    name: Text | None = None


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def names(self) -> dict[str, str]:
        """Its fields by the names that settings have elsewhere, where they differ."""
        most = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return {**super().names, "prompt": "messages", **most}

    def contradictions(self) -> list[Problem]:
        """Fields that mean nothing beside the others."""
        problems = super().contradictions()
        if self.top_logprobs is not None and not self.logprobs:
            problems.append(Problem("top_logprobs", "says nothing without logprobs: true; add that, or leave it out"))
        most = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(most) > 1:
            said = f"is {self.max_completion_tokens} and max_tokens is {self.max_tokens}; give one of them"
            problems.append(Problem("max_completion_tokens", said))
        return problems


class ErrorDetail(BaseModel):
    """What is wrong, and with which field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """A failure in OpenAI's form."""

    error: ErrorDetail


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Of each token of a text: its own text, its log-probability, the likeliest tokens', and where it starts."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class CompletionResponse(BaseModel):
    """Texts for some prompts, or a chunk of them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(BaseModel):
    """A token of a chat's answer, or one that was likely there."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class ChosenLogprob(TokenLogprob):
    """With the likeliest ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Of each token of an answer."""

    content: list[ChosenLogprob]


class Answer(BaseModel):
    """What the model says."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunkChoice(BaseModel):
    """What is new of one answer."""

    index: int
    delta: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatResponse(BaseModel):
    """Answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(BaseModel):
    """A chunk of answers."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelEntry(BaseModel):
    """A model that is served; `max_length` are its positions, prompt and text."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hybrid-recipes"
    max_length: int
    chat: bool


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
