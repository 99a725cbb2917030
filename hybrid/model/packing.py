"""Several sequences in one row: what keeps each of them from seeing its neighbours.

Attention, rotary positions and multi-token prediction take the lengths of the sequences (Megatron's `thd` format, one
row of all tokens); the convolution and the scan of Mamba layers take the number of the sequence at every position.

Shapes: B rows, S positions of a row, T = B S positions in all.
"""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class Packed(PackedSeqParams):
    """Megatron's parameters of packed sequences, and their lengths, which add up to T, on the host.

    `seq_idx` (1, T) int32 counts the sequences up from 0.
    """

    lengths: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str = "cpu") -> "Packed":
        """Describe sequences of these lengths, one after the other, on `device`."""
        sizes = torch.tensor(lengths)
        ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(device, torch.int32, non_blocking=True)
        seq_idx = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), sizes)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            seq_idx=seq_idx.unsqueeze(0).to(device, non_blocking=True),
            lengths=lengths,
        )


def row(sequence_length: int, micro_batch_size: int, packed: bool) -> tuple[int, int]:
    """Return positions and rows of what goes from one pipeline stage to the next."""
    return (sequence_length * micro_batch_size, 1) if packed else (sequence_length, micro_batch_size)


def pack(batch: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], Packed | None]:
    """Lay the rows of a micro batch end to end, if they hold packed sequences.

    batch: tensors (B, S) on the host, among them, if they do, "seq_idx": integers that change where another sequence
    begins. Returns the other tensors, (1, T) then, on `device`, and what the model is to know of the sequences.
    """
    batch = dict(batch)
    seq_idx = batch.pop("seq_idx", None)
    if seq_idx is None:
        return {key: value.to(device, non_blocking=True) for key, value in batch.items()}, None
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    edges = torch.cat([begins.flatten().nonzero().squeeze(1), torch.tensor([seq_idx.numel()])])
    flat = {key: value.reshape(1, -1).to(device, non_blocking=True) for key, value in batch.items()}
    return flat, Packed.of(edges.diff().tolist(), device)
