"""The models of the 2024 hybrid example, with the settings of its training script.

Source of every constant, unless a comment says otherwise: NVIDIA/Megatron-LM, `examples/mamba/train.sh` of 2024,
which belongs to "An Empirical Study of Mamba-based Language Models" (Waleffe et al., arXiv 2406.07887).
"""

from typing import TYPE_CHECKING, Any

from hybrid.config import ModelConfig, OptimizerConfig, TrainerConfig
from hybrid.run import pretrain
from recipes import parts
from recipes.nodes import config, partial
from recipes.registry import recipe

if TYPE_CHECKING:
    import fiddle as fdl

# The SentencePiece file of 256,000 tokens that lies beside the released weights (nvidia/mamba2-hybrid-8b-3t-4k);
# data.tokenizer=PATH says where it is.
TOKENIZER = "mt_nlg_plus_multilingual_ja_zh_the_stack_frac_015_256k.model"


@recipe(gpu="h100", gpus=8)
def hybrid_800m() -> "fdl.Partial[Any]":
    """Mamba-2 hybrid of 0.9B parameters (48 layers, 8% attention, 50% MLP), one GPU upwards."""
    return partial(
        pretrain,
        name="hybrid_800m",
        model=_model(num_layers=48, hidden_size=1024, num_attention_heads=16),
        parallel=parts.tensor_parallel(1),
        data=parts.indexed(sequence_length=4096, tokenizer=TOKENIZER),
        optimizer=_optimizer(),
        trainer=_trainer(global_batch_size=32),
        checkpoint=parts.checkpoints_every(2000),
    )


@recipe(gpu="h100", gpus=8)
def hybrid_8b() -> "fdl.Partial[Any]":
    """Mamba-2 hybrid of 8.7B parameters (56 layers, 8% attention, 50% MLP), tensor parallel 4, four GPUs upwards."""
    recipe = hybrid_800m()
    recipe.name = "hybrid_8b"
    recipe.model = _model(num_layers=56, hidden_size=4096, num_attention_heads=32)
    recipe.parallel = parts.tensor_parallel(4)
    recipe.trainer.global_batch_size = 8
    return recipe


def _model(num_layers: int, hidden_size: int, num_attention_heads: int) -> "fdl.Config[ModelConfig]":
    return config(
        ModelConfig,
        num_layers=num_layers,
        attention_ratio=0.08,
        mlp_ratio=0.5,
        hidden_size=hidden_size,
        ffn_hidden_size=4 * hidden_size,
        activation="gelu",
        normalization="RMSNorm",
        add_linear_bias=False,
        num_attention_heads=num_attention_heads,
        num_query_groups=8,
        position_embedding="none",
        # Not in the script: the defaults of megatron-core's Mamba-2 mixer, which the script leaves as they are.
        mamba_version=2,
        mamba_state_dim=128,
        mamba_head_dim=64,
        mamba_num_groups=8,
        vocab_size=256_000,
        vocab_size_multiple=128,
        tie_embeddings=False,
        init_std=0.02,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _optimizer() -> "fdl.Config[OptimizerConfig]":
    return config(
        OptimizerConfig,
        lr=2.5e-4,
        min_lr=2.5e-5,
        schedule="cosine",
        warmup_samples=50_000,
        decay_samples=73_192_188,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        clip_grad=1.0,
    )


def _trainer(global_batch_size: int) -> "fdl.Config[TrainerConfig]":
    return config(
        TrainerConfig,
        max_samples=73_242_188,  # 300B tokens
        micro_batch_size=4,
        global_batch_size=global_batch_size,
        precision="bf16",
        eval_interval=2000,
        eval_steps=32,
    )
