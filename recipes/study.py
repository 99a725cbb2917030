"""The 8B models of "An Empirical Study of Mamba-based Language Models" (Waleffe et al., arXiv 2406.07887).

Widths are those of the released checkpoints (nvidia/mamba2-8b-3t-4k, nvidia/gpt3-8b-multi-3.5t-base) and of the
paper's section 2; the schedules are the paper's, section 3: 3.5T tokens in batches of 1024 samples with a learning
rate of 3e-4, and 1.1T tokens in batches of 256 with 1e-4 (Mamba-1 was trained for these only). The hybrid of the same
study is `hybrid_8b`, in `seed`.
"""

from typing import TYPE_CHECKING, Any

from hybrid.config import ModelConfig, OptimizerConfig, TrainerConfig
from hybrid.run import pretrain
from recipes import parts
from recipes.nodes import config, partial
from recipes.registry import recipe
from recipes.seed import TOKENIZER

if TYPE_CHECKING:
    import fiddle as fdl

SEQUENCE_LENGTH = 4096


@recipe(gpu="h100", gpus=64)
def mamba2_8b() -> "fdl.Partial[Any]":
    """Pure Mamba-2 of 8.2B parameters (56 layers), the study's counterpart to the hybrid."""
    return partial(
        pretrain,
        name="mamba2_8b",
        model=_mamba(mamba_version=2, mamba_head_dim=64, mamba_num_groups=8),
        parallel=parts.tensor_parallel(4),
        data=parts.indexed(SEQUENCE_LENGTH, TOKENIZER),
        optimizer=_optimizer(lr=3e-4, min_lr=3e-5),
        trainer=_trainer(tokens=3_500_000_000_000, global_batch_size=1024),
        checkpoint=parts.checkpoints_every(2000),
    )


@recipe(gpu="h100", gpus=64)
def mamba_8b() -> "fdl.Partial[Any]":
    """Mamba-1 of 8.1B parameters (56 layers, state 128), trained for 1.1T tokens in the study."""
    recipe = mamba2_8b()
    recipe.name = "mamba_8b"
    recipe.model = _mamba(mamba_version=1, mamba_expand=2)
    recipe.optimizer = _optimizer(lr=1e-4, min_lr=1e-5)
    recipe.trainer = _trainer(tokens=1_100_000_000_000, global_batch_size=256)
    return recipe


@recipe(gpu="h100", gpus=64)
def transformer_8b() -> "fdl.Partial[Any]":
    """Transformer of 8.5B parameters (32 blocks of attention and MLP, RoPE), the study's baseline."""
    recipe = mamba2_8b()
    recipe.name = "transformer_8b"
    recipe.model = config(
        ModelConfig,
        layer_pattern="*-" * 32,
        hidden_size=4096,
        ffn_hidden_size=16384,
        activation="squared_relu",
        normalization="LayerNorm",
        num_attention_heads=32,  # and as many key-value heads: the study's transformer has no GQA
        position_embedding="rope",
        rotary_percent=0.5,
        vocab_size=256_000,
    )
    return recipe


def _mamba(**differences: Any) -> "fdl.Config[ModelConfig]":
    return config(
        ModelConfig,
        layer_pattern="M" * 56,
        hidden_size=4096,
        num_attention_heads=32,
        mamba_state_dim=128,
        vocab_size=256_000,
        **differences,
    )


def _optimizer(lr: float, min_lr: float) -> "fdl.Config[OptimizerConfig]":
    return config(OptimizerConfig, lr=lr, min_lr=min_lr, schedule="cosine", warmup_samples=122_000)


def _trainer(tokens: int, global_batch_size: int) -> "fdl.Config[TrainerConfig]":
    return config(
        TrainerConfig,
        max_samples=tokens // SEQUENCE_LENGTH,
        micro_batch_size=4,
        global_batch_size=global_batch_size,
    )
