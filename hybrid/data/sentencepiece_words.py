"""SentencePiece's BPE word by word, each different word encoded once.

Most words of a text have been there before. The library goes through the merges of each again; here it is asked once
about each word, and a new word that is ASCII is put together from runs of letters and of other characters that are
known already. The outcome is the same, id for id, because

- a merge makes a piece of the vocabulary, and no piece goes on from another character into a space, or in ASCII from a
  letter into something else or back (SentencePiece's trainer sees to that, and it is looked up): what happens on one
  side of such a place does not depend on the other;
- what the library is asked about stands behind a character that no piece joins with it, and is not changed by the
  normalizer; a text with a word where that cannot be had is left to the library.

A model that is not BPE (unigram adds up the scores of a whole text, rounding as it goes), one without pieces for single
bytes (neighbours that are unknown become one piece), and one with pieces across words are left to the library.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hybrid.data.bytelevel import Words

SPACE = "\u2581"  # how SentencePiece writes a space
_find_words = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+").findall
_find_parts = re.compile(f"{SPACE}*[A-Za-z]+|{SPACE}*[^A-Za-z{SPACE}]+|{SPACE}+").findall
_ACROSS_WORDS = re.compile(f"[^{SPACE}]{SPACE}").search
_ACROSS_PARTS = re.compile(rf"[A-Za-z](?![A-Za-z{SPACE}])[\x00-\x7f]|(?![A-Za-z{SPACE}])[\x00-\x7f][A-Za-z]").search


class _LeaveIt(Exception):
    """A word that the library does not see as it is."""


def word_encoder(processor: Any) -> Callable[[Sequence[str], np.dtype], list[np.ndarray]] | None:
    """Return a function that encodes texts as a `SentencePieceProcessor` does; None for a model of another kind."""
    ids = range(processor.get_piece_size())
    special = [processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) for i in ids]
    pieces = [processor.id_to_piece(i) for i in ids if not special[i]]
    if not _is_bpe(processor) or not any(map(processor.is_byte, ids)) or any(map(_ACROSS_WORDS, pieces)):
        return None
    in_parts = not any(map(_ACROSS_PARTS, pieces))
    before = processor.normalize("a").removesuffix("a")  # the space that is put before a text, if one is
    leads = {lead: processor.encode(lead) if lead else [] for lead in ("a", "(", "")}

    def ask(word: str, lead: str) -> list[int]:
        if processor.normalize(lead + word) != before + lead + word:
            raise _LeaveIt
        encoded = processor.encode(lead + word)
        if encoded[: len(leads[lead])] != leads[lead]:
            raise _LeaveIt
        return encoded[len(leads[lead]) :]

    def remember(dtype: np.dtype) -> Words:
        def encode_part(part: str) -> bytes:
            lead = "(" if part[0].isalpha() else "a"
            return np.array(ask(part, lead), dtype).tobytes()

        def encode_word(word: str) -> bytes:
            if in_parts and word.lstrip(SPACE).isascii():
                return b"".join(map(parts.__getitem__, _find_parts(word)))
            # A word without a space before it is the first of a text to which none is added.
            return np.array(ask(word, "a" if word[0] == SPACE else ""), dtype).tobytes()

        parts = Words(encode_part)
        return Words(encode_word)

    words: dict[np.dtype, Words] = {}

    def encode_texts(texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        if dtype not in words:
            words[dtype] = remember(dtype)
        known, result = words[dtype], []
        for text in texts:
            try:
                found = _find_words(processor.normalize(text))
                result.append(np.frombuffer(b"".join(map(known.__getitem__, found)), dtype))
            except _LeaveIt:
                result.append(np.array(processor.encode(text), dtype))
        return result

    return encode_texts


def _is_bpe(processor: Any) -> bool:
    """What the model says of itself: field 2 is the training's settings, of them field 3 the type (2: BPE).

    From sentencepiece_model.proto; read here because protobuf need not be installed.
    """
    settings = _fields(processor.serialized_model_proto()).get(2, b"")
    assert isinstance(settings, bytes)
    return _fields(settings).get(3) == 2


def _fields(message: bytes) -> dict[int, int | bytes]:
    """The last value of each field of a protobuf message; numbers of fixed width are left out."""
    found: dict[int, int | bytes] = {}
    at = 0
    while at < len(message):
        tag, at = _number(message, at)
        if tag & 7 == 0:
            found[tag >> 3], at = _number(message, at)
        elif tag & 7 == 2:
            size, at = _number(message, at)
            found[tag >> 3] = message[at : at + size]
            at += size
        else:
            at += 8 if tag & 7 == 1 else 4
    return found


def _number(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        value |= (message[at] & 127) << shift
        shift += 7
        at += 1
        if message[at - 1] < 128:
            return value, at
