"""SentencePiece's BPE by words gives what the library gives, however its text is normalized."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.data import bytelevel
from hybrid.data.sentencepiece_words import word_encoder
from tests.hybrid.data.conftest import TEXT

UINT16 = np.dtype(np.uint16)
# What the normalizer changes, what joins, what is a space to somebody, and the space of SentencePiece itself.
TRICKY = "aA1 .,(_\n\t\u2581\u2581\u3000\xa0\u0301\u200déﬁ①漢ж😀🏽<0x41>|</s>"
MODELS: dict[str, dict[str, Any]] = {
    "as trained by default": {},
    "identity, spaces kept": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no space put before": {"add_dummy_prefix": False},
    "Llama's": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    },
    "pieces of letters with others": {"split_by_unicode_script": False, "split_by_number": False},
    "symbols of the user": {"user_defined_symbols": ["<|end|>", "a(", "\n"]},
}


def train(folder: Path, **options: Any) -> Any:
    options = {"model_type": "bpe", "byte_fallback": True, **options}
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter((TEXT + "print(f(x), a._b(1))  \n" * 9).splitlines()),
        model_prefix=str(folder / "model"),
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "model.model"))


@pytest.fixture(scope="module", params=MODELS)
def processor(request, tmp_path_factory) -> Any:
    return train(tmp_path_factory.mktemp("model"), **MODELS[request.param])


@pytest.fixture(scope="module")
def encode(processor):
    encode = word_encoder(processor)
    assert encode is not None
    return encode


@settings(max_examples=100)
@given(text=st.text(st.sampled_from(TRICKY)) | st.text() | st.text(st.sampled_from("ab(. \n")))
def test_words_give_the_librarys_ids(processor, encode, text):
    assert encode([text], UINT16)[0].tolist() == processor.encode(text)


def test_a_text_gives_the_librarys_ids_also_the_second_time(processor, encode):
    for _ in range(2):
        assert encode([TEXT, TRICKY], UINT16)[0].tolist() == processor.encode(TEXT)


def test_words_beyond_the_memory_are_encoded_all_the_same(processor, monkeypatch):
    monkeypatch.setattr(bytelevel, "_MOST_REMEMBERED", 1)
    encode = word_encoder(processor)
    assert encode is not None
    assert encode([TEXT], UINT16)[0].tolist() == processor.encode(TEXT)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"byte_fallback": False},
        {"treat_whitespace_as_suffix": True},
        {"split_by_whitespace": False},
    ],
)
def test_other_models_are_left_to_the_library(tmp_path, options):
    assert word_encoder(train(tmp_path, **options)) is None
