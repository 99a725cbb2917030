"""Decoding steps as CUDA graphs, one for every batch size that occurs: launched as a whole, without Python between."""

import torch
from torch import Tensor

from hybrid.generation import forward
from hybrid.generation.state import Slots
from hybrid.generation.weights import Weights


class DecodeGraphs:
    """A graph for each batch size. Capturing runs steps on the rows as they are: do it before they hold sequences."""

    def __init__(self, weights: Weights, slots: Slots, batches: list[int]):
        self._tokens = torch.zeros(max(batches), dtype=torch.int64, device=weights.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}
        pool = None
        for batch in reversed(batches):  # the largest first: the others fit into its memory
            given = self._tokens[:batch]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # kernels are compiled, libraries choose theirs
                    forward.decode(weights, slots, batch, given)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._logits[batch] = forward.decode(weights, slots, batch, given)
            pool = pool or graph.pool()
            self._graphs[batch] = graph

    def replay(self, tokens: Tensor, batch: int) -> Tensor:
        """Decode tokens (B), B at most `batch`, which is one of the batch sizes; the rows after them are nobody's.

        Returns logits (batch, V), which the next replay overwrites.
        """
        self._tokens[: len(tokens)].copy_(tokens)
        self._graphs[batch].replay()
        return self._logits[batch]
