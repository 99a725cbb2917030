"""Text to token ids and back. Importing this loads no tokenizer library, no numpy and no torch.

`load_tokenizer` is the way in: `"byte"` needs no file; anything else is a tokenizer file or folder.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from hybrid.data.chat_template import ChatTemplate

# Written into a checkpoint's tokenizer folder; says which kind of tokenizer the files beside it are.
MANIFEST = "hybrid_tokenizer.json"


class StreamDecoder(Protocol):
    """Token ids in, one at a time; text out as soon as it is certain."""

    def push(self, token: int) -> str:
        """Return the text that this token completes; "" while a character is unfinished."""
        ...

    def finish(self) -> str:
        """Return what is left at the end: U+FFFD for a character that was never finished."""
        ...


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer.

    megatron-core's datasets take such an object too: they read `vocab_size`, `eod` and `unique_identifiers`.
    """

    @property
    def spec(self) -> str:
        """What the user wrote to name it."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to this, exclusive."""
        ...

    @property
    def eod(self) -> int:
        """The id that ends a document."""
        ...

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What distinguishes this vocabulary from any other, whatever path it was loaded from; JSON-serialisable."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end of document."""
        ...

    def encode_batch(self, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        """Token ids of many texts, each (tokens,) of `dtype`: what `encode` gives, faster. One thread."""
        ...

    def encode_parts(self, texts: Sequence[str], /) -> list[list[int]]:
        """Token ids of the parts of one text, such that generation goes on from one part with the next.

        What the tokenizer puts before a text is put before the first part, unless that begins with it.
        """
        ...

    @property
    def chat_template(self) -> ChatTemplate | None:
        """How it lays a conversation out; None: it does not say."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens and ids outside the vocabulary give nothing."""
        ...

    def stream(self, context: Sequence[int] = ()) -> StreamDecoder:
        """A decoder for tokens that arrive one by one, after those of `context` (a prompt, which gives no text)."""
        ...

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, (vocab_size,) int64; 0 for special tokens.

        The loss over a text divided by the sum of this over its tokens is the text's cost per byte.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` needs, so that a checkpoint carries its tokenizer."""
        ...


class ByteTokenizer:
    """A token is a byte of UTF-8; 256 ends a document. Needs no file, loses nothing."""

    spec = "byte"
    vocab_size = 257
    eod = 256
    chat_template = None

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What distinguishes this vocabulary from any other."""
        return {"kind": "byte", "vocab_size": self.vocab_size, "eod": self.eod}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end of document."""
        return list(text.encode("utf-8", errors="surrogateescape"))

    def encode_batch(self, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        """Token ids of many texts, each (bytes,) of `dtype`."""
        import numpy as np

        return [np.frombuffer(text.encode(), np.uint8).astype(dtype) for text in texts]

    def encode_parts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the parts of a text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids that are not bytes give nothing."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def stream(self, context: Sequence[int] = ()) -> StreamDecoder:
        """A decoder that holds back the bytes of an unfinished character."""
        return _ByteStream(context)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, (257,) int64: 1 for a byte, 0 for the end of a document."""
        import numpy as np

        return np.array([1] * 256 + [0], dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` needs, and the same tokenizer as Hugging Face's libraries read it."""
        from hybrid.data.bytelevel import byte_vocabulary

        write_manifest(folder, {"kind": "byte"})
        for name, content in byte_vocabulary("<|endoftext|>").items():
            (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


class _ByteStream:
    def __init__(self, context: Sequence[int]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in context[-3:]:  # a character has up to four bytes, so a prompt may end within one
            self.push(token)

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token])) if token < 256 else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a tokenizer folder's manifest: its kind and the name of its file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def load_tokenizer(spec: str, place: str = "data.tokenizer") -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` (or the option called `place`) names.

    `spec` is "byte"; a SentencePiece `.model`; a Hugging Face `tokenizer.json`, or the folder of one; a tiktoken
    vocabulary in the JSON form that megatron-core reads; or a folder that a checkpoint's tokenizer was saved in.

    Raises ConfigError when there is no such file or it is no tokenizer, UserError when its library is not installed.
    """
    from hybrid.errors import ConfigError, Problem, UserError

    if spec == "byte":
        return ByteTokenizer()
    path = tokenizer_path(spec, place)
    try:
        kind, file, options = _recognise(path)
        if kind == "byte":
            return ByteTokenizer()
        from hybrid.data import tokenizer_files

        return tokenizer_files.KINDS[kind](spec, file, **options)
    except ImportError as error:
        brings = "`uv sync --inexact --extra data` in the project's folder brings it"
        raise UserError(f"the tokenizer '{spec}' needs the package {error.name}: {brings}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(Problem(place, f"'{spec}' cannot be read as a tokenizer: {reason}")) from error


def tokenizer_path(spec: str, place: str = "data.tokenizer") -> Path:
    """Where a tokenizer that is not "byte" is. Raises ConfigError if nothing is there."""
    from hybrid.errors import ConfigError, Problem

    path = Path(spec).expanduser()
    if not path.exists():
        raise ConfigError(Problem(place, f"there is no tokenizer '{spec}': use 'byte' or the path of a file or folder"))
    return path


def _recognise(path: Path) -> tuple[str, Path, dict[str, Any]]:
    """Return kind, file (or folder) and options of the tokenizer at a path. Raises ValueError when it is none."""
    if path.is_dir():
        if (path / MANIFEST).is_file():
            manifest = json.loads((path / MANIFEST).read_text())
            return manifest.pop("kind"), path / manifest.pop("file", ""), manifest
        if (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file():
            return "huggingface", path, {}
        models = sorted(path.glob("*.model"))
        if len(models) == 1:
            return "sentencepiece", models[0], {}
        raise ValueError("the folder has neither a tokenizer.json nor a single .model")
    if path.suffix == ".model":
        return "sentencepiece", path, {}
    if path.suffix == ".json":
        # megatron-core's tiktoken vocabulary is a list, everything else of this suffix an object.
        with path.open("rb") as file:
            return ("tiktoken" if file.read(64).lstrip()[:1] == b"[" else "tokenizers"), path, {}
    raise ValueError("it is neither a .model (SentencePiece) nor a .json (Hugging Face, tiktoken)")
