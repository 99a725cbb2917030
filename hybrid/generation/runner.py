"""What computes: the weights, the slots, and on CUDA the graphs of a decoding step; over tensor-parallel ranks, too.

The engine talks to the runner of rank 0. Every call of it is told to the other ranks, which follow.

**Why a text does not depend on its batch.** A library may add up a row of a matrix product in another order when there
are more rows beside it; then the last bits of the logits change, and in the end a token. Torch's float32 products on
CPU do so for up to three rows at the end of a batch, and give each row of a multiple of four the same bits. So a batch
is filled up to a multiple of four; a prompt is read by itself, in pieces whose ends depend on its length alone; and
attention goes row by row. On CUDA, products choose their kernel by the batch; `batch_invariant` always computes all
slots there, and reads prompts one by one.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hybrid.generation import forward
from hybrid.generation.graphs import DecodeGraphs, PrefillGraphs, taken_apart
from hybrid.generation.state import allocate, to_device
from hybrid.generation.weights import Experts, Weights

_GRAPH_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_PREFILL_BATCHES = (1, 2, 4, 8)
_breaking_off = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much is computed at once. Rows of the state are sequences, those being read included."""

    slots: int = 32  # sequences decoded together
    max_length: int = 4096  # positions of a sequence, prompt and text
    prefill_chunk: int = 256  # positions of a prompt read at once, between two decoding steps
    batch_invariant: bool = False
    ssm_dtype: torch.dtype | None = None  # of the SSM states; None: the model's
    graphs: bool = True  # on CUDA: decode in graphs


def break_off() -> None:
    """End all groups of this process, and with an error what waits for other ranks in them. Any thread may call it."""
    if not _breaking_off.acquire(blocking=False):
        return  # another thread is at it
    try:
        if dist.is_initialized():
            nccl = dist.get_backend() == "nccl"
            dist.distributed_c10d._abort_process_group() if nccl else dist.destroy_process_group()
    finally:
        _breaking_off.release()


class Runner:
    """Reads prompts into rows of the state, and decodes the first rows. Not to be called by two threads."""

    def __init__(self, weights: Weights, room: Room, control: "dist.ProcessGroup | None" = None):
        """`control` is a gloo group of the tensor-parallel ranks, over which rank 0 tells the others what to do."""
        self.weights, self.room, self._control = weights, room, control
        self._leads = control is not None and control.rank() == 0
        self._cuda = weights.device.type == "cuda"
        together = self._cuda and not room.batch_invariant
        self.prefill_together = min(room.slots, _PREFILL_BATCHES[-1]) if together else 1
        self.reading_rows = range(self._batch(room.slots), self._batch(room.slots) + min(room.slots, 8))
        self._slots = allocate(weights, self.reading_rows.stop, room.max_length, room.ssm_dtype)
        self.pads = self._cuda and forward.pads(weights)
        self._graphs = self._prefill_graphs = None
        if not self._cuda:
            return
        self._warm_up()
        # How many tokens an expert gets is known to the host alone, which a graph leaves out.
        if room.graphs and not any(isinstance(layer, Experts) for layer in weights.layers):
            self._graphs = DecodeGraphs(
                weights, self._slots, sorted({self._batch(n) for n in range(1, room.slots + 1)})
            )
            if self.pads:
                counts = [count for count in _PREFILL_BATCHES if count <= self.prefill_together]
                sizes = [(count, length) for count in counts for length in self._prefill_lengths]
                self._prefill_graphs = PrefillGraphs(weights, self._slots, sizes, self._graphs.pool)

    @property
    def _prefill_lengths(self) -> list[int]:
        """To which of them a piece of a prompt is padded."""
        most = min(self.room.prefill_chunk, self.room.max_length)
        return sorted({-(-most // 4), most})

    def _warm_up(self) -> None:
        """Let the kernels that read prompts be compiled and chosen before somebody waits for that minute."""
        row = self.reading_rows[0]
        length = max(1, min(self.room.prefill_chunk, self.room.max_length // 2))
        for _ in range(min(2, self.room.max_length)):  # from nothing, and from what has been read
            self._read([row], [[0] * length])  # the other ranks do so themselves
        self._slots.reset(row)

    @property
    def asynchronous(self) -> bool:
        """Whether a step only begins when it is asked for, and can be told of tokens that are still being made."""
        return self._cuda and self._control is None

    def reset(self, row: int) -> None:
        """Let the next piece that is read into a row be the beginning of a sequence."""
        self._tell("reset", row)
        self._slots.reset(row)

    def copy(self, source: int, target: int) -> None:
        """Make a row that of the same sequence as another."""
        self._tell("copy", source, target)
        self._slots.copy(source, target)

    def read(self, rows: list[int], tokens: list[list[int]], every: bool = False) -> Tensor:
        """Read a piece of a prompt into each of some rows.

        Without `pads`, or with `every`, they must have seen as much, and the pieces be as long. With it, there must be
        1, 2, 4 or 8 of them. Returns logits (rows, positions, vocabulary), of every position or of the last one.
        """
        self._tell("read", rows, tokens, every)
        return self._read(rows, tokens, every)

    def _read(self, rows: list[int], tokens: list[list[int]], every: bool = False) -> Tensor:
        if self.pads and not every:
            return self._read_padded(rows, tokens)[:, None, : self.weights.vocab_size]
        with torch.inference_mode():
            given = to_device(tokens, torch.int64, self.weights.device)
            hidden = forward.prefill(self.weights, self._slots, rows, given)
            logits = forward.logits(self.weights, hidden if every else hidden[:, -1:].contiguous())
        return logits[..., : self.weights.vocab_size]

    def _read_padded(self, rows: list[int], tokens: list[list[int]]) -> Tensor:
        longest = max(map(len, tokens))
        length = next((length for length in self._prefill_lengths if length >= longest), longest)
        heads = [[row, self._slots.lengths[row], len(own)] for row, own in zip(rows, tokens, strict=True)]
        padded = [own + [0] * (length - len(own)) for own in tokens]
        numbers = [head + own for head, own in zip(heads, padded, strict=True)]
        given = to_device(numbers, torch.int64, self.weights.device)
        if self._prefill_graphs is not None:
            logits = self._prefill_graphs.replay(given, length)
        else:
            logits = forward.prefill_padded(self.weights, self._slots, *taken_apart(given, length))
        for row, own in zip(rows, tokens, strict=True):
            self._slots.advance([row], len(own))
        return logits

    def step(self, tokens: list[int] | Tensor) -> Tensor:
        """Read one token in each of the first rows. Returns logits (rows, vocabulary).

        Tokens that the device has made are taken from there; then there must be no other ranks.
        """
        self._tell("step", tokens)
        count = len(tokens)
        batch = self._batch(count)
        given = tokens if isinstance(tokens, Tensor) else to_device(tokens, torch.int64, self.weights.device)
        if self._graphs is not None:
            logits = self._graphs.replay(given, batch)
        else:
            logits = forward.decode(self.weights, self._slots, count, F.pad(given, (0, batch - count)))
        self._slots.stepped(count)
        return logits[:count, : self.weights.vocab_size]

    def stop(self) -> None:
        """Let the other ranks go, and leave their group."""
        self._tell("stop")
        self._leave()

    def fail(self) -> None:
        """Leave the group without the other ranks, which may be gone."""
        if self._control is not None:
            self._graphs = self._prefill_graphs = None
            break_off()

    def _leave(self) -> None:
        if self._control is not None:
            self._graphs = self._prefill_graphs = None  # NCCL waits until none holds its operations
            dist.destroy_process_group()

    def follow(self) -> None:
        """Do what rank 0 does, until it stops."""
        while True:
            told: list[Any] = [None]
            dist.broadcast_object_list(told, src=0, group=self._control)
            name, arguments = told[0]
            if name == "stop":
                self._leave()
                return
            getattr(self, name)(*arguments)

    def _tell(self, name: str, *arguments: Any) -> None:
        if self._leads:
            dist.broadcast_object_list([(name, arguments)], src=0, group=self._control)

    def _batch(self, count: int) -> int:
        """As how many rows `count` sequences are computed."""
        if self._cuda:
            wanted = self.room.slots if self.room.batch_invariant else count
            return next((batch for batch in _GRAPH_BATCHES if batch >= wanted), -(-wanted // 64) * 64)
        return -(-count // 4) * 4
