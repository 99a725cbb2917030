import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.data.tokenizer import ByteTokenizer, load_tokenizer
from hybrid.errors import ConfigError

tokenizer = ByteTokenizer()


@given(st.text())
def test_bytes_give_back_any_text(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, 400)))
def test_a_stream_gives_the_text_that_decoding_at_once_gives(ids):
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


def test_a_stream_holds_back_unfinished_characters():
    stream = tokenizer.stream()
    assert [stream.push(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    stream.push("€".encode()[0])
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_prompt_that_was_not_utf8_on_the_command_line_keeps_its_bytes():
    assert tokenizer.encode(b"a\xff".decode("utf-8", "surrogateescape")) == [97, 255]


def test_each_byte_costs_one_and_the_end_of_a_document_nothing():
    weights = tokenizer.token_bytes()
    assert weights.shape == (tokenizer.vocab_size,)
    assert weights[tokenizer.encode("aé€")].sum() == len("aé€".encode())
    assert weights[tokenizer.eod] == 0


def test_a_saved_tokenizer_is_loaded_from_its_folder(tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    assert load_tokenizer(str(tmp_path / "tokenizer")).unique_identifiers == tokenizer.unique_identifiers


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*'bytes'"):
        load_tokenizer("bytes")


def test_knowing_the_byte_vocabulary_needs_no_library():
    code = """
import sys
from hybrid.data.tokenizer import load_tokenizer
assert load_tokenizer("byte").vocab_size == 257
heavy = {"torch", "megatron", "nemo_run", "fiddle", "numpy", "transformers", "tokenizers", "sentencepiece", "rich"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_checkpoints_byte_tokenizer_is_one_to_hugging_faces_libraries_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).unique_identifiers == tokenizer.unique_identifiers
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn 'äß€ \U0001f40d'  # 9\r\n"
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.eod, tokenizer.vocab_size)
