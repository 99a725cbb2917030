"""The z-loss (PaLM, arXiv 2204.02311, section 5): a pull of the softmax's denominator towards 1.

Shapes: S positions, B batch, V rows of the vocabulary on this tensor-parallel rank.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


def add(model: Any, coefficient: float) -> None:
    """Add `coefficient` times the squared log of the softmax's sum to the loss of every token of a `HybridModel`.

    The loss that the model returns stays the cross entropy; only its gradient has both.
    """
    cross_entropy = model.compute_language_model_loss

    def compute(labels: Tensor, logits: Tensor) -> Tensor:
        """labels (B, S), logits (S, B, V); returns (B, S)."""
        # The cross entropy is the log of the sum less the label's logit, whichever kernel computes it. It overwrites
        # the logits, so that this one is read before.
        own = _label_logits(labels, logits, model.tp_group)
        losses = cross_entropy(labels, logits)
        penalty = coefficient * (losses.float() + own).square()
        return losses + (penalty - penalty.detach())

    model.compute_language_model_loss = compute


def _label_logits(labels: Tensor, logits: Tensor, group: ProcessGroup) -> Tensor:
    """The logit of each label (B, S), in float32, from the rank that has it."""
    rows = logits.shape[-1]
    index = labels.t() - rows * group.rank()
    here = (index >= 0) & (index < rows)
    positions, batch = (torch.arange(size, device=logits.device) for size in index.shape)
    # By indexing, whose backward pass, unlike that of `gather`, does not mind that the logits are overwritten.
    chosen = logits[positions[:, None], batch, index.clamp(0, rows - 1)].float() * here
    return reduce_from_tensor_model_parallel_region(chosen, group).t()
