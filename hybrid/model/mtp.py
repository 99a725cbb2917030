"""The loss of multi-token prediction, in the place of upstream's `process_mtp_loss`.

Upstream's weighs a depth by the tokens that are left of the sequence at that depth, counted on one rank: under context
parallelism only one rank has the end of the sequence, and the gradient is not that of a single process. It also finds
the likeliest token of every position in every step, for a log. Here neither.

Shapes: S positions of this rank, B batch, h hidden, n depths.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.hybrid import hybrid_model
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, roll_tensor
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup


def mtp_loss(
    *,
    hidden_states: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    output_layer: Callable[..., tuple[Tensor, Any]],
    output_weight: Tensor | None,
    runtime_gather_output: bool | None,
    is_training: bool,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    config: TransformerConfig,
    cp_group: ProcessGroup,
    packed_seq_params: PackedSeqParams | None = None,
    **_: Any,
) -> Tensor:
    """Add the gradient of the depths' losses to the main hidden states, which are returned, (S, B, h).

    hidden_states ((1 + n) S, B, h): the main model's, then those of each depth; labels and loss_mask (B, S). A depth
    counts as much as if none of its positions were masked: its mean loss times the tokens of the main loss.
    """
    assert config.mtp_num_layers is not None and config.calculate_per_token_loss
    main, *depths = hidden_states.chunk(1 + config.mtp_num_layers)
    if labels is None or not is_training:
        return main
    # Megatron's 16-bit wrapper casts the mask, whose sum needs more digits.
    mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask.float()
    roll: Any = roll_tensor
    labels = labels.clone()
    tokens = _sum(mask.sum(), cp_group)
    weight = (config.mtp_loss_scaling_factor or 0.0) / config.mtp_num_layers
    for hidden in depths:
        logits, _ = output_layer(hidden, weight=output_weight, runtime_gather_output=runtime_gather_output)
        labels, _ = roll(labels, cp_group=cp_group, packed_seq_params=packed_seq_params)
        mask, left = roll(mask, cp_group=cp_group, packed_seq_params=packed_seq_params)
        losses = compute_language_model_loss(labels, logits) * mask  # type: ignore[arg-type]
        left = _sum(left, cp_group).clamp(min=1)  # type: ignore[arg-type]
        main: Any = MTPLossAutoScaler.apply(main, losses * (weight * tokens / left))
    return main


def _sum(count: Tensor, group: ProcessGroup) -> Tensor:
    if group.size() > 1:
        count = count.clone()
        torch.distributed.all_reduce(count, group=group)
    return count


upstream: Any = hybrid_model
upstream.process_mtp_loss = mtp_loss
