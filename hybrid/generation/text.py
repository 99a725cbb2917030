"""From tokens to text as they arrive: whole characters, and nothing past a stop string, however it is tokenized."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hybrid.data.tokenizer import ByteTokenizer, Tokenizer
from hybrid.generation.sampling import Chosen, Sampling

_CONTEXT = 4  # tokens before one that its text may depend on
_BYTE = "bytes:\\x"


@dataclass(frozen=True)
class TokenText:
    """A token with its own text, and log-probabilities if they were asked for.

    `offset` is where it begins: how many characters are complete before it.
    """

    token: int
    text: str
    logprob: float | None
    top: list[tuple[str, float]]
    offset: int = 0


@dataclass
class Piece:
    """What came in one go: text that is certain (it can be empty), its tokens, and why it ended, once it has.

    `echo`: it is the prompt.
    """

    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    reason: str | None = None
    echo: bool = False


class TextStream:
    """The text of one sequence. `push` tokens, then `finish` with the reason why it ended."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling):
        self._tokenizer, self._sampling = tokenizer, sampling
        self._ids = list(prompt[-_CONTEXT:])
        self._decoder = tokenizer.stream(prompt)
        echoed = sampling.echo and sampling.logprobs is not None
        self._length = len(tokenizer.decode(prompt)) if echoed else 0  # of the text, with what is held back
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, chosen: Chosen) -> Piece:
        """Take a token; `stopped` says whether a stop string has been met."""
        token = self.describe(self._ids, chosen)
        self._ids = [*self._ids[-_CONTEXT + 1 :], chosen.token]
        text = self._decoder.push(chosen.token)
        self._length += len(text)
        return Piece(self._release(text), [token])

    def ended_by(self, chosen: Chosen) -> Piece:
        """A token that ends the text, and is no part of it."""
        return Piece("", [self.describe(self._ids, chosen)])

    def finish(self, reason: str) -> Piece:
        """What was held back, and why it ended."""
        text = "" if self.stopped else self._release(self._decoder.finish())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return Piece(text, [], reason)

    def describe(self, before: Sequence[int], chosen: Chosen) -> TokenText:
        """A token with its text where it stands, and those that were likely there."""
        if self._sampling.logprobs is None:
            return TokenText(chosen.token, "", None, [])
        return _described(self._tokenizer, before, chosen, self._length)

    def _release(self, text: str) -> str:
        """The part of what is there that can be given, up to a stop string or to what may become one."""
        text = self._held + text
        found = [at for stop in self._sampling.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._sampling.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def is_whole(text: str) -> bool:
    """Whether a text can be written in UTF-8: JSON can hold half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def token_text(tokenizer: Tokenizer, before: Sequence[int], token: int) -> str:
    """The text of a token after others; a byte of an unfinished character as OpenAI writes it (bytes:\\xe2)."""
    if isinstance(tokenizer, ByteTokenizer) and 0x80 <= token < tokenizer.eod:
        return f"{_BYTE}{token:02x}"
    start = tokenizer.decode(before)
    both = tokenizer.decode([*before, token])
    text = both[len(start) :] if both.startswith(start) else tokenizer.decode([token])
    return text or tokenizer.decode([token]) or f"<token {token}>"


def text_bytes(text: str) -> list[int] | None:
    """The bytes of what `token_text` gave; None where they are not known, or there are none."""
    if text.startswith(_BYTE):
        return [int(text.removeprefix(_BYTE), 16)]
    known = "\N{REPLACEMENT CHARACTER}" not in text and not text.startswith("<token ")
    return list(text.encode()) if known else None


def _described(tokenizer: Tokenizer, before: Sequence[int], chosen: Chosen, offset: int) -> TokenText:
    before = before[-_CONTEXT:]
    top = [(token_text(tokenizer, before, token), value) for token, value in chosen.top]
    return TokenText(chosen.token, token_text(tokenizer, before, chosen.token), chosen.logprob, top, offset)


def prompt_texts(tokenizer: Tokenizer, prompt: Sequence[int], scores: Sequence[Chosen]) -> list[TokenText]:
    """The tokens of a prompt, the first of which has no log-probability; `scores` are of the others."""
    decoder, offset, result = tokenizer.stream(), 0, []
    for i, chosen in enumerate([Chosen(prompt[0]), *scores]):
        result.append(_described(tokenizer, prompt[max(0, i - _CONTEXT) : i], chosen, offset))
        offset += len(decoder.push(chosen.token))
    return result


Listener = Callable[[Piece], None]
