"""Byte-level BPE by words gives what the library gives, for the patterns of the models that people use."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from hybrid.data import bytelevel

LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "gpt2": None,
    "llama3": SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt4o": r"[^\r\n\p{L}\p{N}]?"
    + rf"{LETTERS[0]}*{LETTERS[1]}+{SHORT}?"
    + r"|[^\r\n\p{L}\p{N}]?"
    + rf"{LETTERS[0]}+{LETTERS[1]}*{SHORT}?"
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# Where engines and versions of Unicode differ, and what the patterns are about.
TRICKY = "aA1 \n\r\t\x1c\x85\xa0\u3000'sſſtLLʼdÉéß漢१²½,.!_<>|😀👍🏽"
TRICKY += "\u200d\u0301\u0e33\ufeff\U00010330\U00020000\ue000\u1c89\u10d0"
UINT16 = np.dtype(np.uint16)


@pytest.fixture(scope="module", params=PATTERNS)
def backend(request, tokenizer_folder) -> Tokenizer:
    name = "with_bos" if request.param == "llama3" else "huggingface"
    backend = Tokenizer.from_file(str(tokenizer_folder / name / "tokenizer.json"))
    if pattern := PATTERNS[request.param]:
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])  # pyright: ignore
    if request.param == "qwen2":
        backend.normalizer = normalizers.NFC()  # pyright: ignore
    return backend


@pytest.fixture(scope="module")
def encode(backend):
    encode = bytelevel.word_encoder(backend)
    assert encode is not None
    return encode


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from(TRICKY)) | st.text() | st.sampled_from(["<s>", "a<|endoftext|>b"]))
def test_words_give_the_librarys_ids(backend, encode, text):
    assert encode([text], UINT16)[0].tolist() == backend.encode(text).ids


def test_every_character_is_put_in_the_librarys_class(backend, encode):
    texts = ["a1".join(map(chr, range(start, start + 32))) for start in range(0, 0xD800, 32)]
    expected = [encoding.ids for encoding in backend.encode_batch(texts)]
    assert [ids.tolist() for ids in encode(texts, UINT16)] == expected


def test_a_word_beyond_the_memory_is_encoded_all_the_same(backend, monkeypatch):
    monkeypatch.setattr(bytelevel, "_MOST_REMEMBERED", 1)
    monkeypatch.setattr(bytelevel, "_LONGEST_REMEMBERED", 3)
    encode = bytelevel.word_encoder(backend)
    assert encode is not None
    texts = ["some words twice", "some words twice"]
    assert [ids.tolist() for ids in encode(texts, UINT16)] == [backend.encode(text).ids for text in texts]


@pytest.mark.parametrize(
    "pattern", [r"^a", r"\p{L}+$", r"(?<=a)b", r"[a&&b]", r"\bword", r"a.b", r"(?i:ß)", r"(a)\1", r"(?i:ss)"]
)
def test_a_pattern_that_engines_may_read_differently_is_left_to_the_library(pattern):
    backend = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])  # pyright: ignore
    assert bytelevel.word_encoder(backend) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
        lambda backend: setattr(backend, "model", models.WordLevel({"a": 0}, unk_token="a")),
    ],
)
def test_other_tokenizers_are_left_to_the_library(tokenizer_folder, change):
    backend = Tokenizer.from_file(str(tokenizer_folder / "huggingface" / "tokenizer.json"))
    change(backend)
    assert bytelevel.word_encoder(backend) is None
