"""Tokenizers that are read from files: SentencePiece, Hugging Face, tiktoken.

They give the ids that megatron-core's wrappers of the same libraries give (a test compares them), but call the
libraries themselves: the wrappers bring megatron-core's and torch's import with them, and encode one text at a time.
"""

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.data import sentencepiece_words
from hybrid.data.bytelevel import special_tokens_around, word_encoder
from hybrid.data.chat_template import ChatTemplate, find_template
from hybrid.data.sentencepiece_words import SPACE
from hybrid.data.tokenizer import StreamDecoder, write_manifest

# Rust's thread pool does not survive a fork, and the workers of a preparation use all cores as it is.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Getting ready to go by words takes a tenth of a second or two: not for a prompt.
_MANY_CHARACTERS = 1 << 16

# What transformers may read in a tokenizer's folder.
_HUGGINGFACE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# Where a bare tokenizer.json does not say which token ends a document.
_USUAL_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")

# The two splitting patterns and the special tokens of megatron-core's tiktoken vocabularies
# (megatron/core/tokenizers/text/libraries/tiktoken_tokenizer.py): ids begin with 1000 special tokens.
_TIKTOKEN_PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_TIKTOKEN_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_TIKTOKEN_NUM_SPECIAL = 1000
_TIKTOKEN_MAX_VOCAB = 1 << 17


@dataclass
class FileTokenizer:
    """A tokenizer read from files: an instance of `hybrid.data.tokenizer.Tokenizer`."""

    spec: str
    kind: str
    files: list[Path]
    vocab_size: int
    eod: int
    encode_texts: Callable[[Sequence[str], np.dtype], list[np.ndarray]]
    decode_known: Callable[[list[int]], str]
    token_bytes: Callable[[], np.ndarray]
    encode_parts: Callable[[Sequence[str]], list[list[int]]]
    options: dict[str, Any] = field(default_factory=dict)
    chat_template: ChatTemplate | None = None

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        self._sha256 = digest.hexdigest()

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What distinguishes this vocabulary from any other: the content of its files."""
        facts = {"kind": self.kind, "sha256": self._sha256, "vocab_size": self.vocab_size, "eod": self.eod}
        return facts | self.options

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end of document."""
        return self.encode_batch([text], np.dtype(np.int32))[0].tolist()

    def encode_batch(self, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        """Token ids of many texts, each (tokens,) of `dtype`."""
        return self.encode_texts(texts, dtype)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens and ids outside the vocabulary give nothing."""
        return self.decode_known([i for i in ids if 0 <= i < self.vocab_size])

    def stream(self, context: Sequence[int] = ()) -> StreamDecoder:
        """A decoder for tokens that arrive one by one, after those of `context`."""
        return _WindowStream(self.decode, context)

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` needs, so that a checkpoint carries its tokenizer."""
        manifest = {"kind": self.kind, **self.options}
        if self.kind != "huggingface":
            manifest["file"] = self.files[0].name
        write_manifest(folder, manifest)
        for file in self.files:
            shutil.copyfile(file, folder / file.name)


class _WindowStream:
    """Decodes the last tokens twice, with and without the new one; the difference is what the new one added."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int]):
        self._decode = decode
        self._ids = list(context[-8:])  # enough for a first token to know that it stands after something
        self._read = len(self._ids)  # tokens whose text has been given

    def push(self, token: int) -> str:
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before, after = self._decode(self._ids[: self._read]), self._decode(self._ids)
        if not final and (after.endswith("\N{REPLACEMENT CHARACTER}") or len(after) <= len(before)):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return after[len(before) :]


def load_sentencepiece(spec: str, path: Path) -> FileTokenizer:
    """Read a SentencePiece model. Raises ValueError when it has no end of a sentence to end documents with."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise ValueError("it is not a SentencePiece model") from error
    if processor.eos_id() < 0:
        raise ValueError("the SentencePiece model has no end-of-sentence piece, which ends documents")

    by_words = cache(lambda: sentencepiece_words.word_encoder(processor))

    def encode_texts(texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        if sum(map(len, texts)) > _MANY_CHARACTERS and (encode := by_words()):
            return encode(texts, dtype)
        return [np.array(ids, dtype) for ids in processor.encode(list(texts), num_threads=1)]

    def token_bytes() -> np.ndarray:
        ids = range(processor.get_piece_size())
        special = [processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i) for i in ids]
        sizes = [1 if processor.is_byte(i) else _utf8_size(processor.id_to_piece(i).replace(SPACE, " ")) for i in ids]
        return np.where(special, 0, sizes).astype(np.int64)

    def encode_parts(texts: Sequence[str]) -> list[list[int]]:
        # Renamed in sentencepiece 0.2.3.
        proto = getattr(processor, "encode_as_proto", None) or processor.encode_as_immutable_proto  # pyright: ignore
        pieces = proto("".join(texts)).pieces
        return _by_part([piece.id for piece in pieces], [piece.end for piece in pieces], texts)

    return FileTokenizer(
        spec,
        "sentencepiece",
        [path],
        processor.get_piece_size(),
        processor.eos_id(),
        encode_texts,
        processor.decode,
        token_bytes,
        encode_parts,
    )


def _by_part(ids: list[int], ends: list[int], texts: Sequence[str]) -> list[list[int]]:
    """Part the tokens of a text into those of its parts: a token belongs where its last character is.

    For tokenizers that encode a part otherwise at the beginning of a text than within it. `ends` are where each token
    ends, in characters.
    """
    edges = np.searchsorted(ends, np.cumsum([len(text) for text in texts]), side="right")
    return [part.tolist() for part in np.split(np.array(ids, np.int64), edges[:-1])]


def load_tiktoken(spec: str, path: Path, pattern: str = "v2") -> FileTokenizer:
    """Read a tiktoken vocabulary in megatron-core's JSON form: a list of {rank, token_bytes, token_str}."""
    import tiktoken

    entries = json.loads(path.read_text())
    vocab_size = min(len(entries) + _TIKTOKEN_NUM_SPECIAL, _TIKTOKEN_MAX_VOCAB)
    special = list(_TIKTOKEN_SPECIAL)
    special += [f"<SPECIAL_{i}>" for i in range(len(special), _TIKTOKEN_NUM_SPECIAL)]
    ranks: dict[bytes, int] = {}
    for i, entry in enumerate(entries[: vocab_size - _TIKTOKEN_NUM_SPECIAL]):
        token = base64.b64decode(entry["token_bytes"])
        if entry["rank"] != i or (i < 256 and token != bytes([i])):
            raise ValueError(f"entry {i} has rank {entry['rank']}, or is not the byte that it should be")
        ranks[token] = i + _TIKTOKEN_NUM_SPECIAL
    encoding = tiktoken.Encoding(
        name=path.name,
        pat_str=_TIKTOKEN_PATTERNS[pattern],
        mergeable_ranks=ranks,
        special_tokens={token: i for i, token in enumerate(special)},
    )

    def encode_texts(texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        return [encoding.encode_to_numpy(text, allowed_special="all").astype(dtype) for text in texts]

    def decode(ids: list[int]) -> str:
        return encoding.decode([i for i in ids if i >= _TIKTOKEN_NUM_SPECIAL])

    def token_bytes() -> np.ndarray:
        return np.array([0] * _TIKTOKEN_NUM_SPECIAL + [len(token) for token in ranks], np.int64)

    eod = special.index("</s>")
    return FileTokenizer(
        spec,
        "tiktoken",
        [path],
        vocab_size,
        eod,
        encode_texts,
        decode,
        token_bytes,
        lambda texts: [encoding.encode(text, allowed_special="all") for text in texts],
        {"pattern": pattern},
    )


def load_tokenizers(spec: str, path: Path) -> FileTokenizer:
    """Read a `tokenizer.json` as it is. A tokenizer_config.json beside it may name the end of a document.

    Raises ValueError when nothing says which token ends a document.
    """
    from tokenizers import Tokenizer

    backend = _parse(Tokenizer, path)
    config = path.with_name("tokenizer_config.json")
    beside = [config, path.with_name("special_tokens_map.json"), path.with_name("chat_template.jinja")]
    template = find_template(path.parent) if config.is_file() else None
    files = [path, *(file for file in beside if file.is_file() and (template or file == config))]
    named = json.loads(config.read_text()).get("eos_token") if config.is_file() else None
    candidates = [named["content"] if isinstance(named, dict) else named] if named else _USUAL_ENDS
    eod = next((i for i in map(backend.token_to_id, candidates) if i is not None), None)
    if eod is None:
        raise ValueError("nothing says which token ends a document: add a tokenizer_config.json with an eos_token")
    return _with_backend(spec, "tokenizers", files, backend, backend.get_vocab_size(), eod, template)


def load_huggingface(spec: str, path: Path) -> FileTokenizer:
    """Read a folder through transformers, which rebuilds many tokenizers from their configuration.

    Raises ValueError when transformers cannot read it, or it has no fast tokenizer or no end of a document.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    if not tokenizer.is_fast:
        raise ValueError("the folder has no fast tokenizer: save one with transformers' convert_slow_tokenizer")
    eod = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if eod is None:
        raise ValueError("the tokenizer has no eos_token, which ends documents")
    files = [path / name for name in _HUGGINGFACE_FILES if (path / name).is_file()]
    backend = tokenizer.backend_tokenizer
    return _with_backend(spec, "huggingface", files, backend, len(tokenizer), eod, find_template(path))


def _parse(cls: Any, path: Path) -> Any:
    try:
        return cls.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"it is not a Hugging Face tokenizer ({error})") from error


def _with_backend(
    spec: str, kind: str, files: list[Path], backend: Any, vocab_size: int, eod: int, template: ChatTemplate | None
) -> FileTokenizer:
    backend.no_padding()
    backend.no_truncation()

    by_words = cache(lambda: word_encoder(backend))

    def encode_texts(texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        if sum(map(len, texts)) > _MANY_CHARACTERS and (encode := by_words()):
            return encode(texts, dtype)
        return [np.array(encoding.ids, dtype) for encoding in backend.encode_batch_fast(list(texts))]

    def token_bytes() -> np.ndarray:
        sizes = np.zeros(vocab_size, np.int64)
        byte_level = "ByteLevel" in str(backend.decoder)
        for token, i in backend.get_vocab(with_added_tokens=False).items():
            if byte_level:
                sizes[i] = len(token)
            elif len(token) == 6 and token.startswith("<0x"):
                sizes[i] = 1
            else:
                sizes[i] = _utf8_size(token.replace(SPACE, " "))
        for i, token in backend.get_added_tokens_decoder().items():
            sizes[i] = 0 if token.special else _utf8_size(token.content)
        return sizes

    def encode_parts(texts: Sequence[str]) -> list[list[int]]:
        def plain(text: str) -> Any:
            return backend.encode(text, add_special_tokens=False)

        if goes_on():
            parts = [plain(text).ids for text in texts]
        else:
            whole = plain("".join(texts))
            parts = _by_part(whole.ids, [end for _, end in whole.offsets], texts)
        if parts[0][: len(before())] != before():
            parts[0] = before() + parts[0]
        return parts

    @cache
    def before() -> list[int]:
        return special_tokens_around(backend)[0]

    @cache
    def goes_on() -> bool:
        """Whether a text is encoded within another as it is alone."""
        alone, within = (backend.encode(text, add_special_tokens=False).ids for text in ("a", "\na"))
        return within[-len(alone) :] == alone

    return FileTokenizer(
        spec,
        kind,
        files,
        vocab_size,
        eod,
        encode_texts,
        backend.decode,
        token_bytes,
        encode_parts,
        chat_template=template,
    )


def _utf8_size(text: str) -> int:
    return len(text.encode("utf-8", errors="replace"))


KINDS: dict[str, Callable[..., FileTokenizer]] = {
    "sentencepiece": load_sentencepiece,
    "tiktoken": load_tiktoken,
    "tokenizers": load_tokenizers,
    "huggingface": load_huggingface,
}
