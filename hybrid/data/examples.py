"""Fine-tuning examples: what a record holds, and its tokens, those that are learned and those that are given.

A record is a JSON object (or a row of a table) with

- "prompt" and "response" (or "completion"): the texts as they stand, nothing is put between them; or
- "messages": a conversation, laid out as `hybrid.data.chat` says. Every message of the assistant is learned.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybrid.data import chat
from hybrid.data.chat import Part
from hybrid.data.chat_template import ChatTemplate
from hybrid.data.encode import Encoded
from hybrid.data.indexed import token_dtype
from hybrid.data.tokenizer import Tokenizer

RESPONSES = ("response", "completion")


@dataclass(frozen=True)
class Example:
    """Picks the parts of an example out of a record (`hybrid.data.inputs.Pick`)."""

    template: ChatTemplate | None

    def __call__(self, record: dict[str, Any]) -> list[Part]:
        """Return given and learned parts in turn. Raises ValueError."""
        parts = self._parts(record)
        try:
            for part in parts:
                part.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text holds half of a surrogate pair, which is no character") from error
        return parts

    def _parts(self, record: dict[str, Any]) -> list[Part]:
        if "messages" in record:
            return chat.conversation(self.template, record["messages"], tools=record.get("tools"))
        response = next((name for name in RESPONSES if name in record), None)
        if "prompt" not in record or response is None:
            keys = ", ".join(f"'{name}'" for name in record) or "none at all"
            raise ValueError(f"there is neither 'messages' nor 'prompt' with 'response' (keys: {keys})")
        for name in ("prompt", response):
            if not isinstance(record[name], str):
                raise ValueError(f"'{name}' is not a text")
        if not record["prompt"] and not record[response]:
            raise ValueError(f"'prompt' and '{response}' are both empty, so there is nothing to learn")
        return [Part(record["prompt"], False), Part(record[response], True)]


def encode_examples(tokenizer: Tokenizer, examples: Iterable[list[Part]]) -> Encoded:
    """Encode examples: every part becomes a sequence, given and learned ones in turn."""
    dtype = token_dtype(tokenizer.vocab_size)
    arrays, lengths, counts, text_bytes = [np.zeros(0, dtype)], [], [], 0
    for parts in examples:
        assert [part.learned for part in parts] == [False, True] * (len(parts) // 2)
        for ids in chat.encode(tokenizer, parts):
            arrays.append(np.array(ids, dtype))
            lengths.append(len(ids))
        counts.append(len(parts))
        text_bytes += sum(len(part.text.encode(errors="replace")) for part in parts)
    return Encoded(np.concatenate(arrays), np.array(lengths, np.int32), np.array(counts, np.int32), text_bytes)
