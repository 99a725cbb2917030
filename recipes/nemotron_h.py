"""Nemotron-H and Nemotron Nano v2, as released.

Patterns, widths and heads: the `config.json` of the released checkpoints (nvidia/Nemotron-H-{4B,8B,47B,56B}-Base-8K,
nvidia/NVIDIA-Nemotron-Nano-{9B,12B}-v2-Base), read as Megatron-Bridge's `nemotron_h_provider.py` has them. Attention
heads are 128 wide in all of them, whatever hidden_size / num_attention_heads is. Training of Nemotron-H: the recipes of
NeMo (`nemo/collections/llm/recipes/nemotronh_*.py`, `optim/adam.py`) and Megatron-Bridge (`recipes/nemotronh`), which
also name the layouts and machines; of Nano v2: the model card of the 12B base. The 4B, 47B and Nano 9B were pruned from
the next larger model and distilled; as recipes they are what it takes to train such a model from nothing.
"""

from typing import TYPE_CHECKING, Any

from hybrid.config import ModelConfig, OptimizerConfig, TrainerConfig
from hybrid.run import pretrain
from recipes import parts
from recipes.nodes import config, partial
from recipes.registry import recipe

if TYPE_CHECKING:
    import fiddle as fdl

SEQUENCE_LENGTH = 8192
TOKENIZER = "Nemotron-H-8B-Base-8K"  # the tokenizer beside the released weights; data.tokenizer=PATH says where it is
PATTERN_52 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"


@recipe(gpu="h100", gpus=64)
def nemotron_h_4b() -> "fdl.Partial[Any]":
    """Nemotron-H of 4.5B parameters (52 layers, 4 of attention), the 8B's pattern at 3/4 of its width."""
    recipe = nemotron_h_8b()
    recipe.name = "nemotron_h_4b"
    recipe.model.hidden_size = 3072
    recipe.model.ffn_hidden_size = 12288
    recipe.model.mamba_num_heads = 112  # pruned from 128: the inner width is 7168, not 2 x 3072
    recipe.parallel = parts.tensor_parallel(1)
    return recipe


@recipe(gpu="h100", gpus=64)
def nemotron_h_8b() -> "fdl.Partial[Any]":
    """Nemotron-H of 8.1B parameters (52 layers, 4 of attention)."""
    return partial(
        pretrain,
        name="nemotron_h_8b",
        model=_model(
            layer_pattern=PATTERN_52,
            hidden_size=4096,
            ffn_hidden_size=21504,
            num_attention_heads=32,
            mamba_num_heads=128,
        ),
        parallel=parts.tensor_parallel(2),
        data=parts.indexed(SEQUENCE_LENGTH, TOKENIZER),
        optimizer=config(
            OptimizerConfig,
            lr=3e-4,
            min_lr=3e-5,
            schedule="cosine",
            warmup_samples=2000 * 768,  # 2000 steps
            eps=1e-5,
        ),
        trainer=config(TrainerConfig, max_steps=1_168_251, micro_batch_size=1, global_batch_size=768),
        checkpoint=parts.checkpoints_every(2000),
    )


@recipe(gpu="h100", gpus=256)
def nemotron_h_47b() -> "fdl.Partial[Any]":
    """Nemotron-H of 47B parameters (98 layers, 5 of attention), FP8; pruned from the 56B."""
    recipe = nemotron_h_56b()
    recipe.name = "nemotron_h_47b"
    recipe.model.layer_pattern = (
        "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
    )
    recipe.model.ffn_hidden_size = 30720
    return recipe


@recipe(gpu="h100", gpus=256)
def nemotron_h_56b() -> "fdl.Partial[Any]":
    """Nemotron-H of 56B parameters (118 layers, 10 of attention), FP8."""
    recipe = nemotron_h_8b()
    recipe.name = "nemotron_h_56b"
    recipe.model = _model(
        layer_pattern="M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-",
        hidden_size=8192,
        ffn_hidden_size=32768,
        num_attention_heads=64,
        mamba_num_heads=256,
        mamba_state_dim=256,
    )
    recipe.parallel = parts.tensor_parallel(8)
    recipe.trainer.precision = "fp8_current"
    return recipe


@recipe(gpu="h100", gpus=64)
def nemotron_nano_9b_v2() -> "fdl.Partial[Any]":
    """Nemotron Nano v2 of 8.9B parameters (56 layers, 4 of attention); pruned from the 12B."""
    recipe = nemotron_nano_12b_v2()
    recipe.name = "nemotron_nano_9b_v2"
    recipe.model.layer_pattern = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
    recipe.model.hidden_size = 4480
    recipe.model.ffn_hidden_size = 15680
    recipe.parallel = parts.tensor_parallel(2)
    recipe.data.tokenizer = "NVIDIA-Nemotron-Nano-9B-v2-Base"
    recipe.trainer.precision = "bf16"
    return recipe


@recipe(gpu="h100", gpus=64)
def nemotron_nano_12b_v2() -> "fdl.Partial[Any]":
    """Nemotron Nano v2 of 12.3B parameters (62 layers, 6 of attention), FP8."""
    recipe = nemotron_h_8b()
    recipe.name = "nemotron_nano_12b_v2"
    recipe.model = _model(
        layer_pattern="M-M-M-M*-" * 6 + "M-M-M-M-",
        hidden_size=5120,
        ffn_hidden_size=20480,
        num_attention_heads=40,
        mamba_num_heads=128,
        mamba_head_dim=80,
    )
    recipe.parallel = parts.tensor_parallel(4)
    recipe.data.tokenizer = "NVIDIA-Nemotron-Nano-12B-v2-Base"
    recipe.optimizer = _nano_optimizer()
    recipe.trainer = config(
        TrainerConfig,
        max_samples=20_000_000_000_000 // SEQUENCE_LENGTH,
        micro_batch_size=1,
        global_batch_size=736,
        precision="fp8_current",
    )
    return recipe


def _model(**differences: Any) -> "fdl.Config[ModelConfig]":
    """What all of these models share."""
    return config(
        ModelConfig,
        activation="squared_relu",
        normalization="RMSNorm",
        num_query_groups=8,
        attention_head_dim=128,
        position_embedding="none",
        mamba_version=2,
        mamba_num_groups=8,
        vocab_size=131_072,
        tie_embeddings=False,
        **{"mamba_state_dim": 128, "mamba_head_dim": 64, **differences},
    )


def _nano_optimizer() -> "fdl.Config[OptimizerConfig]":
    """Warm-up over 8B tokens, a constant rate, and a decay over the last 3.6T of 20T tokens (arXiv 2508.14444)."""
    return config(
        OptimizerConfig,
        lr=4.5e-4,
        min_lr=4.5e-6,
        schedule="wsd",
        warmup_samples=8_000_000_000 // SEQUENCE_LENGTH,
        wsd_decay_samples=3_600_000_000_000 // SEQUENCE_LENGTH,
        eps=1e-5,
    )
