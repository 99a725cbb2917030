"""Conversations as text: what a model is given, and what it is to learn to say.

A tokenizer's own chat template (Jinja, as Hugging Face's tokenizers carry it) lays a conversation out. A tokenizer
without one, such as the byte tokenizer, gets this layout, in which every message stands under the name of its role:

    User:
    What is the capital of Iceland?
    Assistant:
    Reykjavik<end of document>User:
    ...

The end of a document ends what the model says, so that generation stops there.
"""

from dataclasses import dataclass
from typing import Any

from hybrid.data.chat_template import ChatTemplate, Message
from hybrid.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Part:
    """Some text of an example; `learned` is what the model is to say, the rest is what it is given."""

    text: str
    learned: bool


def conversation(template: ChatTemplate | None, messages: list[Message], **others: Any) -> list[Part]:
    """Return a conversation in given and learned parts, in turn: the assistant's messages are learned, to the last one.

    `others` (tools and the like) go to the template. Raises ValueError for messages that cannot be laid out.
    """
    parts, _ = _parts(template, messages, others)
    if not parts:
        raise ValueError("there is no message of the assistant to learn")
    return parts


def prompt(tokenizer: Tokenizer, template: ChatTemplate | None, messages: list[Message]) -> list[int]:
    """Return the ids that a model is given to say the assistant's next message. Raises ValueError.

    A template's text is taken as it is, as Hugging Face's libraries take it; it may write earlier messages otherwise.
    """
    if template is not None:
        return tokenizer.encode_parts([template.render(messages, add_generation_prompt=True)])[0]
    parts, written = _parts(None, messages, {})
    rest = _lay_out(None, messages, True, {})[len(written) :]
    return [i for ids in encode(tokenizer, [*parts, Part(rest, False)]) for i in ids]


_REWRITES = (
    "the tokenizer's chat template writes earlier messages otherwise once others follow; "
    "make an example of each response, ending with it"
)


def _parts(template: ChatTemplate | None, messages: list[Message], others: dict[str, Any]) -> tuple[list[Part], str]:
    """The parts up to the assistant's last message, and their text."""
    _check(messages, template is None)
    parts: list[Part] = []
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _lay_out(template, messages[:i], True, others)
        after = _lay_out(template, messages[: i + 1], False, others)
        if not after.startswith(before):  # the template asks for the assistant in words that are not then kept
            before = _lay_out(template, messages[:i], False, others)
        if not before.startswith(written) or not after.startswith(before):
            raise ValueError(_REWRITES)
        parts += [Part(before[len(written) :], False), Part(after[len(before) :], True)]
        written = after
    return parts, written


def encode(tokenizer: Tokenizer, parts: list[Part]) -> list[list[int]]:
    """Return the ids of each part. A learned part without an end of a document in it gets one at its end."""
    encoded = tokenizer.encode_parts([part.text for part in parts])
    for part, ids in zip(parts, encoded, strict=True):
        if part.learned and tokenizer.eod not in ids:
            ids.append(tokenizer.eod)
    return encoded


def _lay_out(template: ChatTemplate | None, messages: list[Message], asks: bool, others: dict[str, Any]) -> str:
    if template is not None:
        return template.render(messages, add_generation_prompt=asks, **others)
    text = ""
    for message in messages:
        # The end of a document, which a text cannot hold, stands between the assistant's words and the next line.
        end = "" if message["role"] == "assistant" else "\n"
        text += f"{message['role'].capitalize()}:\n{message['content']}{end}"
    return f"{text}Assistant:\n" if asks else text


def _check(messages: Any, plain: bool) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' is not a list of messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} is not an object with a 'role' and a 'content'")
        if plain and not isinstance(message.get("content"), str):
            raise ValueError(f"the content of message {number} is not a text, and the tokenizer has no chat template")
