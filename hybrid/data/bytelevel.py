r"""Byte-level BPE (GPT-2, Llama 3, Qwen and their kin) word by word, each different word encoded once.

Hugging Face's library spends most of its time on bookkeeping of where each piece of text came from. A preparation does
not need it: here Python's `re` cuts the text into words by the tokenizer's own pattern, and a dictionary knows the ids
of every word seen before. The outcome is the same, id for id, because

- the pattern's character classes (`\p{L}`, `\s`) are not Python's but those that the library's own regex engine
  gives when it is asked about every character;
- a new word goes through the tokenizer's own BPE model;
- a text in which a special token is written out, or with characters that nobody was asked about, is left to the
  library;
- a tokenizer or pattern with anything that is not understood here is left to the library, too.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Words of more characters are rarely met again; and so many words are remembered at most.
_LONGEST_REMEMBERED = 64
_MOST_REMEMBERED = 300_000
# The characters whose classes are asked for: the basic plane without surrogates, and the plane of emoji.
_ASKED = ((0, 0xD7FF), (0xE000, 0xFFFF), (0x1F000, 0x1FBFF))
# What a pattern may contain besides classes: the two engines agree on these.
_ESCAPED = re.compile(r"\\([pP]\{\w+\}|[sSdDwW])")
_PLAIN = re.compile(
    r"\\[rntfv\\./'\"+*?()\[\]{}|^$-]|\{\d+(?:,\d*)?\}|\(\?(?::|!|=)|\(\?i:(?![^)]*s[st])['|\[\]sdmtlver]+\)|[^\\\[\](){}^$.]|\)"
)


class _Unknown(Exception):
    """The tokenizer or its pattern is of another kind."""


def word_encoder(backend: Any) -> Callable[[Sequence[str], np.dtype], list[np.ndarray]] | None:
    """Return a function that encodes texts as `backend` (a `tokenizers.Tokenizer`) does; None if that is not known."""
    try:
        return _word_encoder(backend, json.loads(backend.to_str()))
    except _Unknown:
        return None


def _word_encoder(backend: Any, parts: dict[str, Any]) -> Callable[[Sequence[str], np.dtype], list[np.ndarray]]:
    _check_model(parts["model"])
    find_words = re.compile(translate(_pattern(parts["pre_tokenizer"]))).findall
    normalize = _normalizer(backend, parts["normalizer"])
    written_out = [re.escape(token["content"]) for token in parts["added_tokens"]]
    others = f"[^{''.join(f'\\U{first:08x}-\\U{last:08x}' for first, last in _ASKED)}]"
    special = re.compile("|".join([*written_out, others])).search
    before, after = special_tokens_around(backend)
    tokenize, letters = backend.model.tokenize, _byte_letters()
    words: dict[np.dtype, Words] = {}

    def remember(dtype: np.dtype) -> Words:
        def encode_word(word: str) -> bytes:
            ids = [token.id for token in tokenize("".join([letters[byte] for byte in word.encode()]))]
            return np.array(ids, dtype).tobytes()

        return Words(encode_word)

    def encode_texts(texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        if dtype not in words:
            words[dtype] = remember(dtype)
        known = words[dtype]
        start, end = (np.array(ids, dtype).tobytes() for ids in (before, after))
        result: list[np.ndarray] = []
        for text in texts:
            normal = normalize(text)
            found = find_words(normal)
            if special(text) or special(normal) or sum(map(len, found)) != len(normal):
                result.append(np.array(backend.encode(text).ids, dtype))
            else:
                # The ids of a word are remembered as the bytes they are stored as, so that one join does all.
                ids = b"".join([start, *map(known.__getitem__, found), end])
                result.append(np.frombuffer(ids, dtype))
        return result

    return encode_texts


class Words(dict[str, bytes]):
    """Words and their ids, as the bytes they are stored as; `encode` gives those of a word that is not there."""

    def __init__(self, encode: Callable[[str], bytes]):
        self._encode = encode

    def __missing__(self, word: str) -> bytes:
        ids = self._encode(word)
        if len(word) <= _LONGEST_REMEMBERED and len(self) < _MOST_REMEMBERED:
            self[word] = ids
        return ids


def _check_model(model: dict[str, Any]) -> None:
    if model.get("type") != "BPE" or any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise _Unknown


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The pattern of GPT-2's pre-tokenizer, or of a Split before a ByteLevel."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    last = steps[-1] or {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _Unknown
    if len(steps) == 1 and last.get("use_regex", True):
        return _GPT2
    first = steps[0]
    if len(steps) != 2 or last.get("use_regex", True) or first.get("type") != "Split":
        raise _Unknown
    if first.get("behavior") != "Isolated" or first.get("invert") or "Regex" not in first.get("pattern", {}):
        raise _Unknown
    return first["pattern"]["Regex"]


def _normalizer(backend: Any, normalizer: dict[str, Any] | None) -> Callable[[str], str]:
    if normalizer is None:
        return lambda text: text
    if normalizer.get("type") != "NFC":
        raise _Unknown
    return lambda text: text if text.isascii() else backend.normalizer.normalize_str(text)


def special_tokens_around(backend: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a `tokenizers.Tokenizer` puts before and after every text."""
    encoding = backend.encode("a")
    text = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    if not text:
        raise _Unknown
    return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]


def _byte_letters() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary (openai/gpt-2, `bytes_to_unicode`)."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def byte_vocabulary(end: str) -> dict[str, dict[str, Any]]:
    """Return Hugging Face's files, by name, of a byte-level BPE without merges: a byte is its own id, 256 is `end`."""
    special = {"id": 256, "content": end, "special": True}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [special],
            "pre_tokenizer": level,
            "decoder": level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "clean_up_tokenization_spaces": False,
        },
    }


def translate(pattern: str) -> str:
    """Return the pattern for Python's `re`, character classes written out. Raises _Unknown for what may differ."""
    result, at = "", 0
    while at < len(pattern):
        if pattern[at] == "[":
            end = _end_of_set(pattern, at)
            result += _set(pattern[at + 1 : end])
            at = end + 1
        elif escaped := _ESCAPED.match(pattern, at):
            result += f"[{_members(escaped[0])}]"
            at = escaped.end()
        elif plain := _PLAIN.match(pattern, at):
            result += plain[0]
            at = plain.end()
        elif pattern[at] == "(" and pattern[at + 1 : at + 2] != "?":
            result += "(?:"  # findall gives groups where there are some
            at += 1
        else:
            raise _Unknown(pattern[at:])
    return result


def _end_of_set(pattern: str, start: int) -> int:
    at = start + 1
    while at < len(pattern) and pattern[at] != "]":
        if pattern[at] == "[" or pattern[at : at + 2] in ("&&", "--", "||", "~~"):
            raise _Unknown(pattern)
        at += 2 if pattern[at] == "\\" else 1
    return at


def _set(content: str) -> str:
    negated = content.startswith("^")
    return f"[{'^' if negated else ''}{_ESCAPED.sub(lambda found: _members(found[0]), content[negated:])}]"


@cache
def _members(name: str) -> str:
    r"""The characters of a class such as `\p{L}` in the regex engine of Hugging Face's library, as ranges of a set."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    split = Split(Regex(f"{name}+"), "removed", invert=True)  # keeps what matches
    ranges = ""
    for first, last in _ASKED:
        for piece, _ in split.pre_tokenize_str("".join(map(chr, range(first, last + 1)))):
            ranges += f"\\U{ord(piece[0]):08x}-\\U{ord(piece[-1]):08x}"
    return ranges
