"""Causal attention on torch's scaled_dot_product_attention, for the layer specs without transformer-engine.

Megatron's own `DotProductAttention` keeps the whole score matrix and takes it from a CUDA buffer.

Shapes: S sequence of this rank, T sequence of all context-parallel ranks or of all packed sequences, B batch, Q query
heads and K key-value heads of this rank, E head width (values may have another than queries and keys).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hybrid.model.context import in_order
from hybrid.model.packing import Packed


class SdpaAttention(MegatronModule):
    """The `core_attention` of a self-attention layer.

    Under context parallelism a rank has two chunks of the sequence (`hybrid.model.context`). It gathers the keys and
    values of all ranks, which with few key-value heads are small beside the activations of the layer, and lets each of
    its chunks look at what comes before it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self" and pg_collection is not None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query (S, B, Q, E), key and value (S, B, K, E); returns (S, B, Q*E). The mask is always the causal one.

        Packed: query (T, Q, E), key and value (T, K, E); returns (T, Q*E).
        """
        assert attention_bias is None
        ranks = self.context_group.size()
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, Packed) and ranks == 1
            return self._packed(query, key, value, packed_seq_params.lengths)
        if ranks == 1:
            query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            return _joined(self._attend(query, key, value))

        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.context_group)
        key, value = in_order(both, ranks).permute(1, 2, 0, 3).split([key.shape[-1], value.shape[-1]], dim=-1)
        rank, length = self.context_group.rank(), len(query) // 2
        parts = []
        for chunk, part in zip((rank, 2 * ranks - 1 - rank), query.permute(1, 2, 0, 3).chunk(2, dim=2), strict=True):
            seen = (chunk + 1) * length
            # Query i of the chunk is position chunk * length + i of the whole.
            mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(chunk * length)
            parts.append(self._attend(part, key[:, :, :seen], value[:, :, :seen], mask))
        return _joined(torch.cat(parts, dim=2))

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """Each sequence for itself, as if the others were not there."""
        split = [tensor.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for tensor in (query, key, value)]
        return torch.cat([_joined(self._attend(*sequence)) for sequence in zip(*split, strict=True)]).squeeze(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query (B, Q, S, E), key and value (B, K, T, E); without a mask, the causal one of as many keys as queries."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def _joined(heads: Tensor) -> Tensor:
    """(B, Q, S, E) to (S, B, Q*E)."""
    return heads.permute(2, 0, 1, 3).flatten(2)
