"""Recipes that need no GPU, no download and no account."""

from typing import TYPE_CHECKING, Any

from hybrid.config import ModelConfig, OptimizerConfig, TrainerConfig
from hybrid.run import pretrain
from recipes import parts
from recipes.nodes import config, partial
from recipes.registry import recipe

if TYPE_CHECKING:
    import fiddle as fdl


@recipe()
def tiny() -> "fdl.Partial[Any]":
    """A small hybrid on Python's own source code, byte by byte: minutes on two CPU cores."""
    return partial(
        pretrain,
        name="tiny",
        model=config(
            ModelConfig,
            layer_pattern="M-M*-M-M-",
            hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            mamba_state_dim=32,
            mamba_head_dim=32,
            mamba_num_groups=2,
            vocab_size=257,  # the 256 bytes and the end of a document
            vocab_size_multiple=4,
        ),
        parallel=parts.single(),
        data=parts.stdlib(sequence_length=256),
        optimizer=config(OptimizerConfig, lr=4e-3, min_lr=1e-4, warmup_samples=160),
        trainer=config(
            TrainerConfig,
            max_steps=500,
            micro_batch_size=8,
            global_batch_size=8,
            precision="fp32",
            eval_interval=250,
            eval_steps=60,  # the whole of the held-out files
        ),
        checkpoint=parts.checkpoints_every(100),
    )
