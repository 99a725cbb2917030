"""Small tokenizers of each kind, trained on a text that has something of everything."""

import base64
import json
from pathlib import Path

import pytest

TEXT = "It's a text: 1234 words, twice!\n\n\tdef f(x): return x + 1  # größer 漢字 😀\r\n" * 20


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    _huggingface(folder / "huggingface", {})
    _huggingface(folder / "with_bos", {"bos_token": "<s>"})
    _sentencepiece(folder)
    pieces = [bytes([i]) for i in range(256)] + [b"th", b" t", b"wo", b"\xe6\xbc\xa2", b"  "]
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(piece).decode(), "token_str": piece.decode(errors="replace")}
        for i, piece in enumerate(pieces)
    ]
    (folder / "tiktoken.json").write_text(json.dumps(entries))
    return folder


def _huggingface(folder: Path, names: dict[str, str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if names:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _sentencepiece(folder: Path) -> None:
    import sentencepiece

    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=iter(TEXT.splitlines()),
            model_prefix=str(folder / kind),
            model_type=kind,
            vocab_size=340,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
