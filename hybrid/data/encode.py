"""Documents to tokens, in this process or in several, always in order."""

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, Protocol

import numpy as np

from hybrid.data.indexed import token_dtype
from hybrid.data.tokenizer import Tokenizer
from hybrid.errors import UserError

# Bytes of text in a block: enough to keep a worker busy for a while, little enough to hold a few for each worker.
BLOCK_BYTES = 4 << 20

# A document: one text, or several that become one sequence each (Megatron's list of sentences).
Document = str | list[str]


class Block(Protocol):
    """Some consecutive documents, small enough to be held in memory."""

    @property
    def source_bytes(self) -> int:
        """Bytes of the input that this block is, for the progress bar."""
        ...

    def documents(self) -> Iterable[Any]:
        """Read the documents."""
        ...


@dataclass(frozen=True)
class Encoded:
    """Tokens of some documents end to end, tokens of each sequence, sequences of each document, and their text."""

    tokens: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    text_bytes: int


@dataclass(frozen=True)
class Texts:
    """Documents that have been read already."""

    texts: list[Any]
    source_bytes: int

    def documents(self) -> Iterable[Any]:
        """Return the documents."""
        return self.texts


def encode_documents(tokenizer: Tokenizer, documents: Iterable[Document]) -> Encoded:
    """Encode documents and end each with the end of a document.

    As in Megatron's tools/preprocess_data.py: a text without tokens makes no sequence; a document without sequences
    stays empty, without an end; else the end belongs to the last sequence.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    sentences = [[document] if isinstance(document, str) else document for document in documents]
    texts = [text for sentence in sentences for text in sentence]
    encoded = iter(tokenizer.encode_batch(texts, dtype))
    end = np.array([tokenizer.eod], dtype)
    arrays: list[np.ndarray] = []
    lengths: list[int] = []
    counts: list[int] = []
    for sentence in sentences:
        sequences = [ids for ids in islice(encoded, len(sentence)) if len(ids)]
        counts.append(len(sequences))
        if sequences:
            arrays += sequences
            arrays.append(end)
            lengths += map(len, sequences)
            lengths[-1] += 1
    return Encoded(
        np.concatenate(arrays) if arrays else np.zeros(0, dtype),
        np.array(lengths, np.int32),
        np.array(counts, np.int32),
        sum(len(text) if text.isascii() else len(text.encode()) for text in texts),
    )


def encode_blocks[B: Block](
    blocks: Iterator[B],
    tokenizer: Tokenizer,
    workers: int,
    encode: Callable[[Tokenizer, Iterable[Any]], Encoded] | None = None,
) -> Generator[tuple[B, Encoded], None, None]:
    """Yield each block with its tokens, in order, from `workers` processes (1: this one alone).

    `encode` is `encode_documents`, or another function of a module. At most two blocks a worker wait their turn.
    Raises what reading a block raises, and UserError when a worker dies.
    """
    if workers == 1:
        for block in blocks:
            yield block, (encode or encode_documents)(tokenizer, block.documents())
        return
    # Forked, so that a vocabulary is in memory once.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,))
    waiting: deque[tuple[B, Future[Encoded]]] = deque()
    try:
        while True:
            waiting.extend(
                (block, pool.submit(_encode, block, encode)) for block in islice(blocks, 2 * workers - len(waiting))
            )
            if not waiting:
                return
            block, encoded = waiting.popleft()
            yield block, encoded.result()
    except BrokenProcessPool as error:
        message = "a worker process was killed, as happens when memory runs out: use fewer workers"
        raise UserError(message) from error
    finally:
        for _, encoded in waiting:
            encoded.cancel()
        pool.shutdown(wait=True, cancel_futures=True)


_tokenizer: Tokenizer


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        signal.raise_signal(signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode(block: Block, encode: Callable[[Tokenizer, Iterable[Any]], Encoded] | None) -> Encoded:
    return (encode or encode_documents)(_tokenizer, block.documents())
