"""Choosing the next token.

A request's random numbers depend on its seed and on how many tokens it has, and on nothing else: no generator is
shared, so that the text of a request is the same whatever else is computed beside it. Shares are computed in float64,
where two orders of adding up differ by 1e-16: a random number that falls between them is not met.

Shapes: B rows, V vocabulary.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from math import isfinite
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from hybrid.errors import ConfigError, Problem
from hybrid.generation.state import to_device

_MOST_TOP_LOGPROBS = 20
NONE = -1
"""Instead of a token, where the model's logits are no numbers."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and when it ends. Raises ConfigError for every value that makes no sense.

    `stop` may be given as one text, and it and `stop_tokens` as lists; they become tuples.

    The penalty comes first, then the temperature, top_k, top_p and min_p, each on what the one before it left, as in
    transformers' `generate`.
    """

    max_tokens: int = 256
    temperature: float = 0.8  # 0: the likeliest token
    top_k: int = 0  # the k likeliest; 0: all
    top_p: float = 1.0  # the likeliest with this share together; 1: all
    min_p: float = 0.0  # those with at least this share of the likeliest's; 0: all
    repetition_penalty: float = 1.0  # above 1: tokens that were there become less likely (Keskar et al. 2019)
    seed: int | None = None  # None: another text every time
    stop: tuple[str, ...] = ()  # text that ends it, and is left out of it
    stop_tokens: tuple[int, ...] = ()  # tokens that end it, besides the end of a document
    ignore_end: bool = False  # go on past the end of a document
    logprobs: int | None = None  # log-probabilities of each token, and of this many of the likeliest
    echo: bool = False  # give the prompt again; with logprobs, its log-probabilities, too

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value in (("stop", stop), ("stop_tokens", self.stop_tokens)):
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))
        problems = [Problem(name, f"is {getattr(self, name)!r}; {rule}") for name, rule in self._wrong()]
        if problems:
            raise ConfigError(problems)

    def _wrong(self) -> list[tuple[str, str]]:
        """Names of settings with the rule that they break: of their type, else of their range."""
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "max_tokens": (lambda count: count >= 0, "it must be 0 or more"),
            "temperature": (lambda value: 0 <= value <= 100, "it must be from 0 (the likeliest token) to 100"),
            "top_k": (lambda count: count >= 0, "it must be 0 (no limit) or more"),
            "top_p": (lambda share: 0 < share <= 1, "it must be above 0 and at most 1 (no limit)"),
            "min_p": (lambda share: 0 <= share <= 1, "it must be from 0 (no limit) to 1"),
            "repetition_penalty": (lambda value: 0.01 <= value <= 100, "it must be from 0.01 to 100; 1 is none"),
            "seed": (lambda seed: seed is None or -(2**63) <= seed < 2**63, "it must fit 64 bits"),
            "stop": (lambda texts: all(texts) and len(texts) <= 16, "there can be 16 at most, and none is empty"),
            "logprobs": (
                lambda count: count is None or 0 <= count <= _MOST_TOP_LOGPROBS,
                f"it must be from 0 to {_MOST_TOP_LOGPROBS}",
            ),
        }
        wrong = []
        for name, hint in _types().items():
            value = getattr(self, name)
            right, rule = rules.get(name, (lambda _: True, ""))
            if not _is(value, hint):
                wrong.append((name, f"it must be {_WORDS[hint]}"))
            elif not right(value):
                wrong.append((name, rule))
        return wrong

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0 or self.top_k == 1


NAMES = frozenset(field.name for field in fields(Sampling))
_WORDS: dict[Any, str] = {
    int: "a whole number",
    int | None: "a whole number or None",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: "a text or a list of texts",
    tuple[int, ...]: "a list of tokens",
}


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(Sampling)


def settings_of(values: Mapping[str, Any]) -> Sampling:
    """Settings by their names. Raises ConfigError for those that there are not and for wrong values, all at once."""
    known = {name: value for name, value in values.items() if name in NAMES}
    there_are = f"is no setting; there are {', '.join(sorted(NAMES))}"
    problems = [Problem(name, there_are) for name in sorted(values.keys() - NAMES)]
    try:
        sampling = Sampling(**known)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return sampling


def _is(value: object, hint: Any) -> bool:
    """Whether a value is of a setting's type; true is no number, though it is an int of Python's."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is(each, get_args(hint)[0]) for each in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


@dataclass(frozen=True)
class Chosen:
    """A token, its log-probability under the model, and the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Row:
    """What choosing one sequence's next token takes: `seen` are its tokens so far, prompt included, once each."""

    sampling: Sampling
    key: bytes
    position: int = 0  # tokens chosen so far
    seen: set[int] = field(default_factory=set)

    @property
    def plain(self) -> bool:
        """Whether its next token is the likeliest."""
        return self.sampling.greedy and self.sampling.repetition_penalty == 1

    @property
    def blind(self) -> bool:
        """Whether the host need not know the last token to choose the next, nor say more of it than what it is."""
        return self.sampling.repetition_penalty == 1 and self.sampling.logprobs is None

    def take(self, token: int) -> None:
        """Note the token that was chosen, if one was."""
        if token != NONE:
            self.position += 1
            self.seen.add(token)


def new_key(seed: int | None, number: int = 0) -> bytes:
    """What a sequence draws its random numbers from: seed, and which of the texts for one prompt it is."""
    start = os.urandom(8) if seed is None else seed.to_bytes(8, "little", signed=True)
    return start + number.to_bytes(8, "little")


def uniform(key: bytes, position: int) -> float:
    """The random number of one position, in [0, 1): a hash of key and position, so that none is drawn twice."""
    digest = hashlib.blake2b(position.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def choose(logits: Tensor, rows: Sequence[Row]) -> list[Chosen]:
    """The next token of every row, as of `pick`: logits (B, V) without the padding of the vocabulary."""
    tokens = pick(logits, rows).tolist()
    result = [Chosen(token) for token in tokens]
    wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None and tokens[i] != NONE]
    if wanted:
        counts = [rows[i].sampling.logprobs or 0 for i in wanted]
        for i, chosen in zip(wanted, logprobs(logits[wanted], [tokens[i] for i in wanted], counts), strict=True):
            result[i] = chosen
    for row, token in zip(rows, tokens, strict=True):
        row.take(token)
    return result


def pick(logits: Tensor, rows: Sequence[Row], ahead: int = 0) -> Tensor:
    """As `choose`: the tokens alone (B), on their device, and the rows are as before.

    Each row has chosen `ahead` tokens more than it knows. Where logits are no numbers (NaN, or infinite), the token is
    `NONE`.
    """
    tokens = logits.argmax(-1)  # that of a NaN, if there is one
    greatest = logits.gather(-1, tokens.unsqueeze(-1))
    others = [i for i, row in enumerate(rows) if not row.plain]
    if len(others) == len(rows):
        tokens = _sample(logits, rows, tokens, ahead)
    elif others:
        where = to_device(others, torch.int64, logits.device)
        tokens[where] = _sample(logits[where], [rows[i] for i in others], tokens[where], ahead)
    # On a CPU, where nobody has to wait for it, a look is cheaper than two operations more.
    if not greatest.is_cuda and all(map(isfinite, greatest.flatten().tolist())):
        return tokens
    return torch.where(greatest.squeeze(-1).isfinite(), tokens, NONE)


def logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Chosen]:
    """Log-probabilities under the model itself, before any of the settings: of tokens, and of the likeliest."""
    shares = logits.double().log_softmax(-1)
    own = shares.gather(-1, torch.tensor(tokens, device=shares.device).unsqueeze(-1)).squeeze(-1).tolist()
    most = min(max(counts), shares.shape[-1])
    values, indices = shares.topk(most, dim=-1)
    tops = [list(zip(i, v, strict=True)) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
    return [Chosen(t, o, top[:n]) for t, o, top, n in zip(tokens, own, tops, counts, strict=True)]


def _sample(logits: Tensor, rows: Sequence[Row], likeliest: Tensor, ahead: int) -> Tensor:
    """Draw from what the settings leave: logits (B, V), of which `likeliest` (B) are the likeliest tokens."""
    settings = [row.sampling for row in rows]

    def column(values: Sequence[float]) -> Tensor:
        return to_device(values, torch.float64, logits.device).unsqueeze(-1)

    logits = logits.double()
    for i, row in enumerate(rows):
        if row.sampling.repetition_penalty != 1:
            seen = torch.tensor(sorted(row.seen), device=logits.device)
            there = logits[i, seen]
            penalty = row.sampling.repetition_penalty
            logits[i, seen] = torch.where(there > 0, there / penalty, there * penalty)
    if any(row.sampling.repetition_penalty != 1 and row.sampling.greedy for row in rows):
        likeliest = logits.argmax(-1)
    # Less the greatest first: what a small temperature makes of it would have no room in a float64.
    logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / column([1.0 if s.temperature == 0 else s.temperature for s in settings])
    if any(s.top_k or s.top_p < 1 for s in settings):
        logits = _without_tail(
            logits, column([s.top_k or logits.shape[-1] for s in settings]), column([s.top_p for s in settings])
        )
    shares = logits.softmax(-1)
    if any(s.min_p for s in settings):
        shares = shares.masked_fill(shares < column([s.min_p for s in settings]) * shares.amax(-1, keepdim=True), 0)
    sums = shares.cumsum(-1)
    drawn = column([uniform(row.key, row.position + ahead) for row in rows]) * sums[:, -1:]
    # A token without a share ends where the one before it ends, and is passed over.
    tokens = torch.searchsorted(sums, drawn, right=True).clamp(max=logits.shape[-1] - 1).squeeze(-1)
    if any(s.greedy for s in settings):
        tokens = torch.where(to_device([s.greedy for s in settings], torch.bool, logits.device), likeliest, tokens)
    return tokens


def _without_tail(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the top_k (B, 1) likeliest, and of them the likeliest that have a share of top_p (B, 1) together."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(ranks >= top_k, -torch.inf)
    shares = ordered.softmax(-1)
    # A token stays while those before it have less than top_p: the first one always does.
    outside = (shares.cumsum(-1) - shares >= top_p) & (top_p < 1) | (ranks >= top_k)
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
