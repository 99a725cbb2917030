"""SentencePiece, Hugging Face and tiktoken: the ids of megatron-core's wrappers, and text back."""

import sys
from pathlib import Path

import numpy as np
import pytest

from hybrid.data.tokenizer import load_tokenizer
from hybrid.errors import ConfigError, UserError

NAMES = ["huggingface", "huggingface/tokenizer.json", "with_bos", "bpe.model", "unigram.model", "tiktoken.json"]
# Texts that megatron-core's wrappers take; the tool never gives them an empty one.
TEXTS = ["It's a test", " leading", "trailing  ", "größer 漢字 ж 😀", "a\r\n\tb\x1c", "</s> <|endoftext|><s>", "12345"]
LIBRARIES = {"json": "tiktoken", "model": "sentencepiece"}


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(tokenizer_folder, name):
    return load_tokenizer(str(tokenizer_folder / name))


def test_ids_are_those_of_megatrons_wrappers(tokenizer_folder, name, tokenizer):
    from megatron.core.tokenizers import MegatronTokenizer

    path = tokenizer_folder / name.removesuffix("/tokenizer.json")
    library = "huggingface" if path.is_dir() else LIBRARIES[path.suffix[1:]]
    options = {"vocab_size": 1261} if library == "tiktoken" else {}
    theirs = MegatronTokenizer.from_pretrained(str(path), {"library": library}, **options)  # pyright: ignore
    assert (tokenizer.vocab_size, tokenizer.eod) == (theirs.vocab_size, theirs.eod)  # pyright: ignore
    expected = [theirs.tokenize(text) for text in TEXTS]  # pyright: ignore
    assert [tokenizer.encode(text) for text in TEXTS] == expected
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS, np.dtype(np.uint16))] == expected
    many = tokenizer.encode_batch(TEXTS * 1000, np.dtype(np.int32))  # enough to go by words
    assert [ids.tolist() for ids in many] == expected * 1000


def test_text_comes_back(tokenizer, name):
    text = "It's größer,\n漢字 and 😀."
    expected = text.replace("\n", " ") if name == "unigram.model" or name == "bpe.model" else text
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.decode([tokenizer.eod, tokenizer.vocab_size + 5, *tokenizer.encode("a")]) == "a"


def test_a_stream_gives_the_text_that_decoding_at_once_gives(tokenizer):
    for text in ["It's größer, 漢字 and 😀.", "  two  spaces", ""]:
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        pieces = [*map(stream.push, ids), stream.finish()]
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stream_goes_on_from_a_prompt(tokenizer):
    prompt, ids = tokenizer.encode("It's a"), tokenizer.encode("It's a text 漢")
    assert ids[: len(prompt)] == prompt
    stream = tokenizer.stream(prompt)
    assert "".join([*map(stream.push, ids[len(prompt) :]), stream.finish()]) == " text 漢"


def test_tokens_know_their_bytes(tokenizer, name):
    text = "It's größer, 漢字 and 😀."
    weights = tokenizer.token_bytes()
    assert weights.shape == (tokenizer.vocab_size,) and weights[tokenizer.eod] == 0
    dummy_prefix = name.endswith(".model")  # SentencePiece puts a space before every text
    assert weights[tokenizer.encode(text)].sum() == len(text.encode()) + dummy_prefix


def test_a_checkpoint_can_carry_it(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert loaded.unique_identifiers == tokenizer.unique_identifiers
    assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "{}", "is not a Hugging Face tokenizer"),
        ("x.json", "[1, 2]", "cannot be read as a tokenizer"),
        ("x.json", "", "is not a Hugging Face tokenizer"),
        ("x.model", "text", "it is not a SentencePiece model"),
        ("x.txt", "text", "neither a .model"),
        ("folder/readme", "text", "neither a tokenizer.json nor a single .model"),
        ("folder/tokenizer_config.json", "{}", "cannot be read as a tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_one_clear_sentence(tmp_path, name, content, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    path = str(tmp_path / Path(name).parts[0])
    with pytest.raises(ConfigError, match=rf"^data\.tokenizer: .*{message}") as error:
        load_tokenizer(path)
    assert len(str(error.value).splitlines()) == 1


def test_a_tokenizer_without_an_end_of_documents_is_refused(tokenizer_folder, tmp_path):
    text = (tokenizer_folder / "huggingface" / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(ConfigError, match="nothing says which token ends a document"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_missing_library_is_named(tokenizer_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"needs the package sentencepiece: `uv sync --inexact --extra data`"):
        load_tokenizer(str(tokenizer_folder / "bpe.model"))
