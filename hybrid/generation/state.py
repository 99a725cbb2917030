"""What a model carries from token to token, for a fixed number of sequences: one contiguous tensor a layer.

A row of every tensor belongs to one sequence. Rows from 0 up are decoded together, so that a batch is a view of the
first rows, and nothing is gathered; when a sequence ends, the last one takes its row. The rows after `slots` hold
sequences whose prompt is still being read.

Shapes: S rows, C channels of the convolution, W its width, H SSM heads, P head width, N state, d inner width, K
key-value heads, T positions, E head width (values may have another).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.generation.weights import Attention, Latent, Mamba1, Mamba2, Weights


@dataclass(frozen=True)
class MambaState:
    """conv (S, W, C), the last inputs; ssm (S, H, P, N) for Mamba-2, (S, d, N) for Mamba-1."""

    conv: Tensor
    ssm: Tensor

    def keep(self, rows: slice | Tensor, conv: Tensor, ssm: Tensor) -> None:
        """Put what some rows have come to in its place."""
        self.conv[rows] = conv
        self.ssm[rows] = ssm.to(self.ssm.dtype)


@dataclass(frozen=True)
class AttentionState:
    """key and value (S, K, T, E)."""

    key: Tensor
    value: Tensor


@dataclass
class Slots:
    """The states of the layers, None for a layer without one, and how many positions each row has seen.

    `lengths` are known to the host, `device_lengths` (S) to the device, for graphs that are replayed.
    """

    layers: list[MambaState | AttentionState | None]
    lengths: list[int]
    device_lengths: Tensor
    max_length: int

    def reset(self, row: int) -> None:
        """Let the next piece that is read into a row be the beginning of a sequence: what is there is overwritten."""
        self._set_length(row, 0)

    def copy(self, source: int, target: int) -> None:
        """Make a row that of the same sequence as another."""
        length = self.lengths[source]
        for state in self.layers:
            if isinstance(state, MambaState):
                state.conv[target] = state.conv[source]
                state.ssm[target] = state.ssm[source]
            elif isinstance(state, AttentionState):
                state.key[target, :, :length] = state.key[source, :, :length]
                state.value[target, :, :length] = state.value[source, :, :length]
        self._set_length(target, length)

    def advance(self, rows: Iterable[int], count: int) -> None:
        """Note that rows have seen `count` more positions."""
        for row in rows:
            self._set_length(row, self.lengths[row] + count)

    def stepped(self, count: int) -> None:
        """Note on the host that the first rows have seen one more position, as `forward.decode` does on the device."""
        for row in range(count):
            self.lengths[row] += 1

    def _set_length(self, row: int, length: int) -> None:
        self.lengths[row] = length
        self.device_lengths[row] = length


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers from the host, without waiting there for what the device is computing."""
    made = torch.tensor(values, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def allocate(weights: Weights, rows: int, max_length: int, ssm_dtype: torch.dtype | None = None) -> Slots:
    """Room for `rows` sequences of at most `max_length` positions. SSM states are in `ssm_dtype`, else the model's."""
    made = {"device": weights.device, "dtype": weights.dtype}
    layers: list[MambaState | AttentionState | None] = []
    for layer in weights.layers:
        if isinstance(layer, Mamba2 | Mamba1):
            shape = (layer.heads, layer.head_dim) if isinstance(layer, Mamba2) else (layer.A.shape[0],)
            ssm = torch.zeros(rows, *shape, layer.state_dim, device=weights.device, dtype=ssm_dtype or weights.dtype)
            layers.append(MambaState(torch.zeros(rows, *layer.taps.shape, **made), ssm))
        elif isinstance(layer, Attention | Latent):
            cache = (rows, layer.groups, max_length)
            key, value = (torch.zeros(*cache, width, **made) for width in (layer.head_dim, layer.value_dim))
            layers.append(AttentionState(key, value))
        else:
            layers.append(None)
    lengths = torch.zeros(rows, dtype=torch.int64, device=weights.device)
    return Slots(layers, [0] * rows, lengths, max_length)
