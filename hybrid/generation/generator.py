"""Text from a model: one object to ask, from Python, the command and the server alike.

with recipes.open_generator("tiny") as model:
    print(model.generate("def ", temperature=0).text)
    for piece in model.stream("def ", seed=1):
        print(piece.text, end="")
"""

import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

from hybrid.data import chat
from hybrid.data.chat_template import ChatTemplate, Message
from hybrid.data.tokenizer import Tokenizer
from hybrid.errors import ConfigError, Problem, UserError
from hybrid.generation.engine import Closed, Engine, Job, Reason
from hybrid.generation.runner import Runner
from hybrid.generation.sampling import Chosen, Sampling, settings_of
from hybrid.generation.text import Listener, Piece, TextStream, TokenText, prompt_texts

Prompt = str | Sequence[int]


@dataclass
class Completion:
    """A finished text: `tokens` with their log-probabilities if they were asked for, after those of an echoed prompt,
    and then with the token that ended it, if one did.

    `reason` is why it ended: stop (end of document, stop string or token) or length. The first `echoed` characters of
    `text` are an echoed prompt's.
    """

    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    reason: str = "length"
    prompt_tokens: int = 0
    echoed: int = 0

    def add(self, piece: Piece) -> None:
        """Append what came."""
        self.text += piece.text
        self.echoed += len(piece.text) if piece.echo else 0
        self.tokens += piece.tokens
        self.reason = piece.reason or self.reason


class UnknownModel(UserError):
    """There is one model, and it is called otherwise."""


class Generator:
    """A loaded model with its tokenizer. Close it, or use it as a context manager."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        name: str,
        *,
        max_waiting: int = 256,
        chat_template: ChatTemplate | None = None,
        plain_chats: bool = False,
        threads: int = 0,
    ):
        """`name` is what clients call it; `plain_chats`: it has learned conversations in the layout of `data.chat`,
        which are laid out so where there is no `chat_template`; `threads` as of `Engine`.
        """
        if tokenizer.vocab_size > runner.weights.vocab_size:
            sizes = f"{tokenizer.vocab_size} tokens, the model {runner.weights.vocab_size}"
            raise ConfigError(Problem("tokenizer", f"'{tokenizer.spec}' has {sizes}; it is another model's"))
        self.tokenizer, self.name = tokenizer, name
        self.chat_template, self.chats = chat_template, plain_chats or chat_template is not None
        self.engine = Engine(runner, tokenizer.eod, max_waiting, threads)

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close(0)

    def close(self, timeout: float | None = None) -> bool:
        """Finish what is running within `timeout` seconds (None: for ever); returns whether it was finished."""
        return self.engine.close(timeout)

    def generate(self, prompt: Prompt, **settings: Any) -> Completion:
        """The text that follows a prompt; `settings` are fields of `Sampling`. Raises ConfigError for wrong ones."""
        completion = Completion()
        for piece in self.stream(prompt, **settings):
            completion.add(piece)
        completion.prompt_tokens = len(self.encode(prompt))
        return completion

    def generate_batch(self, prompts: Sequence[Prompt], **settings: Any) -> list[Completion]:
        """The texts that follow some prompts, made together."""
        return [completion for _, completion in sorted(self.as_completed(prompts, **settings))]

    def as_completed(self, prompts: Sequence[Prompt], **settings: Any) -> Iterator[tuple[int, Completion]]:
        """As `generate_batch`, each (index, text) as soon as it is finished."""
        if isinstance(prompts, str):
            raise ConfigError(Problem("prompts", "is one text; give a list of them, or call generate"))
        sampling, ids = settings_of(settings), [self.encode(prompt) for prompt in prompts]
        for one in ids:
            self.engine.check(one, sampling)
        yield from self.run([(one, sampling) for one in ids])

    def run(self, requests: Sequence[tuple[list[int], Sampling]]) -> Iterator[tuple[int, Completion]]:
        """Complete any number of (prompt, settings), no more at a time than may wait."""
        done: queue.SimpleQueue[tuple[int, Piece]] = queue.SimpleQueue()
        texts = [Completion(prompt_tokens=len(prompt)) for prompt, _ in requests]

        def listener(index: int) -> Listener:
            # The engine's thread puts the text together: waking another one for every token would cost more than that.
            def listen(piece: Piece) -> None:
                texts[index].add(piece)
                if piece.reason:
                    done.put((index, piece))

            return listen

        jobs: dict[int, Job] = {}
        begun = 0
        limit = self.engine.runner.room.slots + self.engine.max_waiting // 2
        try:
            while jobs or begun < len(requests):
                while begun < len(requests) and len(jobs) < limit:
                    prompt, sampling = requests[begun]
                    jobs[begun] = self.start(prompt, sampling, listener(begun))
                    begun += 1
                index, piece = done.get()
                del jobs[index]
                if error := broken_off(piece.reason):
                    raise error
                yield index, texts[index]
        finally:
            self.engine.cancel(*jobs.values())

    def stream(self, prompt: Prompt, **settings: Any) -> Iterator[Piece]:
        """The text that follows a prompt, piece by piece; the last piece has the reason why it ended.

        It begins with the first piece that is asked for, and leaving the iterator ends it. Raises ConfigError for wrong
        settings, when it is called.
        """
        sampling, ids = settings_of(settings), self.encode(prompt)
        self.engine.check(ids, sampling)
        return self._pieces(ids, sampling)

    def _pieces(self, ids: list[int], sampling: Sampling) -> Iterator[Piece]:
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        job = self.start(ids, sampling, pieces.put)
        try:
            while True:
                piece = pieces.get()
                if error := broken_off(piece.reason):
                    raise error
                yield piece
                if piece.reason:
                    return
        finally:
            self.engine.cancel(job)

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt; tokens are taken as they are. Raises ConfigError for half a character."""
        if not isinstance(prompt, str):
            return _tokens(prompt)
        try:
            return self.tokenizer.encode(prompt)
        except (UnicodeError, TypeError):  # the latter is what Hugging Face's raise for it
            raise ConfigError(Problem("prompt", "holds half of a character, which is no text in UTF-8")) from None

    def chat(self, messages: list[Message]) -> list[int]:
        """The tokens that ask for the assistant's next message. Raises ConfigError if they cannot be laid out."""
        if not self.chats:
            message = "this model's tokenizer has no chat template; use /v1/completions, or --chat-template"
            raise ConfigError(Problem("messages", message))
        try:
            return chat.prompt(self.tokenizer, self.chat_template, messages)
        except ValueError as error:
            raise ConfigError(Problem("messages", str(error))) from error

    def job(self, prompt: list[int], sampling: Sampling, listener: Listener, number: int = 0) -> Job:
        """A job whose text goes to `listener`, which is called on the engine's thread; the last piece has a reason.

        `number` tells several texts for one prompt apart: each has random numbers of its own.
        """
        text = TextStream(self.tokenizer, prompt, sampling)
        scores: list[Chosen] = []
        echoed = False

        def echo() -> None:
            nonlocal echoed
            if sampling.echo and not echoed:
                echoed = True
                tokens = prompt_texts(self.tokenizer, prompt, scores) if sampling.logprobs is not None else []
                listener(Piece(self.tokenizer.decode(prompt), tokens, echo=True))

        def on_token(chosen: Chosen) -> bool:
            echo()
            listener(text.push(chosen))
            return text.stopped

        def on_stop(chosen: Chosen) -> None:
            # It has no text, but whoever adds up log-probabilities has to know that it came, and how likely it was.
            if sampling.logprobs is not None:
                echo()
                listener(text.ended_by(chosen))

        def on_end(reason: Reason) -> None:
            if reason in ("stop", "length"):
                echo()
            listener(text.finish(reason))

        return Job(prompt, sampling, on_token, on_end, scores.extend, on_stop, number)

    def require(self, name: str | None) -> None:
        """Raise UnknownModel if somebody asks for another model than this one."""
        if name not in (None, self.name):
            raise UnknownModel(f"there is no model '{name}' here; there is '{self.name}'")

    def start(self, prompt: list[int], sampling: Sampling, listener: Listener) -> Job:
        """Queue one prompt. Raises ConfigError, QueueFull or Closed."""
        job = self.job(prompt, sampling, listener)
        self.engine.submit(job)
        return job


def _tokens(prompt: Sequence[int]) -> list[int]:
    """Tokens as Python's own numbers, whatever library they come from."""
    try:
        given = list(prompt)
        if not any(isinstance(token, bool) for token in given):
            return [index(token) for token in given]
    except TypeError:
        pass
    raise ConfigError(Problem("prompt", f"is {prompt!r}; give a text or a list of tokens"))


def broken_off(reason: str | None) -> UserError | None:
    """What is to be said instead of a text that did not come to its end."""
    if reason == "error":
        return UserError("the model failed while it was computing; the log says how")
    if reason == "cancelled":
        return Closed("the model is being closed, and the text was not finished in time")
    return None
