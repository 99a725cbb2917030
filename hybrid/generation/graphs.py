"""Steps and pieces of prompts as CUDA graphs, one for each size that occurs: launched as a whole, without Python
between. Capturing runs them on the rows as they are: do it before those hold sequences."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybrid.generation import forward
from hybrid.generation.state import Slots
from hybrid.generation.weights import Weights


class DecodeGraphs:
    """A graph for each batch size."""

    def __init__(self, weights: Weights, slots: Slots, batches: list[int]):
        self._tokens = torch.zeros(max(batches), dtype=torch.int64, device=weights.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}
        self.pool = None
        for batch in reversed(batches):  # the largest first: the others fit into its memory
            given = self._tokens[:batch]
            self._graphs[batch], self._logits[batch] = _captured(
                partial(forward.decode, weights, slots, batch, given), self.pool
            )
            self.pool = self.pool or self._graphs[batch].pool()

    def replay(self, tokens: Tensor, batch: int) -> Tensor:
        """Decode tokens (B), B at most `batch`, which is one of the batch sizes; the rows after them are nobody's.

        Returns logits (batch, V), which the next replay overwrites.
        """
        self._tokens[: len(tokens)].copy_(tokens)
        self._graphs[batch].replay()
        return self._logits[batch]


class PrefillGraphs:
    """A graph for each number of prompts and of positions that are read at once, of `forward.prefill_padded`."""

    def __init__(self, weights: Weights, slots: Slots, sizes: list[tuple[int, int]], pool: Any):
        rows, length = (max(axis) for axis in zip(*sizes, strict=True))
        # Per row its number, what it has seen, how much it reads, and the tokens.
        self._given = torch.zeros(rows, 3 + length, dtype=torch.int64, device=weights.device)
        self._given[:, 2] = 1
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        for count, positions in sorted(sizes, reverse=True):
            given = self._given[:count]
            self._graphs[count, positions] = _captured(
                partial(forward.prefill_padded, weights, slots, *taken_apart(given, positions)), pool
            )
            pool = pool or self._graphs[count, positions][0].pool()

    def replay(self, given: Tensor, positions: int) -> Tensor:
        """Read what is given (B, 3 + `positions`); returns logits (B, V), which the next replay overwrites."""
        self._given[: given.shape[0], : given.shape[1]].copy_(given)
        graph, logits = self._graphs[given.shape[0], positions]
        graph.replay()
        return logits


def taken_apart(given: Tensor, positions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, starts, lengths (B) and tokens (B, positions) of what is given (B, 3 + positions) in one tensor."""
    return given[:, 0], given[:, 1], given[:, 2], given[:, 3 : 3 + positions]


def _captured(call: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels are compiled, libraries choose theirs
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = call()
    return graph, result
