"""The published Mamba and Mamba-2 sizes (huggingface.co/state-spaces), trained on 300B tokens of the Pile.

Widths and vocabulary: the `config.json` beside each checkpoint and mamba-ssm's defaults (`mamba_simple.py`, `mamba2.py`
in `mamba_ssm/modules`). Training: "Mamba" (Gu and Dao, arXiv 2312.00752), appendix E.2: GPT-3's batch and warm-up
(Brown et al., arXiv 2005.14165, table 2.1 and appendix B), five times GPT-3's learning rate, cosine decay to 1e-5. One
process holds the whole model: with a single group, Mamba-2's B and C cannot be split over tensor parallel ranks.
"""

from typing import TYPE_CHECKING, Any

from hybrid.config import ModelConfig, OptimizerConfig, TrainerConfig
from hybrid.run import pretrain
from recipes import parts
from recipes.nodes import config, partial
from recipes.registry import recipe

if TYPE_CHECKING:
    import fiddle as fdl

SEQUENCE_LENGTH = 2048
TOKENIZER = "gpt-neox-20b"  # EleutherAI/gpt-neox-20b; data.tokenizer=PATH says where it is


@recipe(gpu="h100", gpus=8)
def mamba2_130m() -> "fdl.Partial[Any]":
    """Mamba-2 of 0.13B parameters (24 layers)."""
    return _mamba2("mamba2_130m", num_layers=24, hidden_size=768, lr=3e-3, micro_batch_size=16)


@recipe(gpu="h100", gpus=8)
def mamba2_370m() -> "fdl.Partial[Any]":
    """Mamba-2 of 0.37B parameters (48 layers)."""
    return _mamba2("mamba2_370m", num_layers=48, hidden_size=1024, lr=1.5e-3, micro_batch_size=16)


@recipe(gpu="h100", gpus=8)
def mamba2_780m() -> "fdl.Partial[Any]":
    """Mamba-2 of 0.78B parameters (48 layers)."""
    return _mamba2("mamba2_780m", num_layers=48, hidden_size=1536, lr=1.25e-3, micro_batch_size=8)


@recipe(gpu="h100", gpus=8)
def mamba2_1_3b() -> "fdl.Partial[Any]":
    """Mamba-2 of 1.3B parameters (48 layers)."""
    return _mamba2("mamba2_1_3b", num_layers=48, hidden_size=2048, lr=1e-3, micro_batch_size=8)


@recipe(gpu="h100", gpus=8)
def mamba2_2_7b() -> "fdl.Partial[Any]":
    """Mamba-2 of 2.7B parameters (64 layers)."""
    return _mamba2("mamba2_2_7b", num_layers=64, hidden_size=2560, lr=8e-4, micro_batch_size=4)


@recipe(gpu="h100", gpus=8)
def mamba_130m() -> "fdl.Partial[Any]":
    """Mamba-1 of 0.13B parameters (24 layers)."""
    return _mamba1("mamba_130m", num_layers=24, hidden_size=768, lr=3e-3, micro_batch_size=16)


@recipe(gpu="h100", gpus=8)
def mamba_370m() -> "fdl.Partial[Any]":
    """Mamba-1 of 0.37B parameters (48 layers)."""
    return _mamba1("mamba_370m", num_layers=48, hidden_size=1024, lr=1.5e-3, micro_batch_size=16)


@recipe(gpu="h100", gpus=8)
def mamba_790m() -> "fdl.Partial[Any]":
    """Mamba-1 of 0.79B parameters (48 layers)."""
    return _mamba1("mamba_790m", num_layers=48, hidden_size=1536, lr=1.25e-3, micro_batch_size=8)


@recipe(gpu="h100", gpus=8)
def mamba_1_4b() -> "fdl.Partial[Any]":
    """Mamba-1 of 1.4B parameters (48 layers)."""
    return _mamba1("mamba_1_4b", num_layers=48, hidden_size=2048, lr=1e-3, micro_batch_size=8)


@recipe(gpu="h100", gpus=8)
def mamba_2_8b() -> "fdl.Partial[Any]":
    """Mamba-1 of 2.8B parameters (64 layers)."""
    return _mamba1("mamba_2_8b", num_layers=64, hidden_size=2560, lr=8e-4, micro_batch_size=4)


def _mamba2(name: str, num_layers: int, hidden_size: int, lr: float, micro_batch_size: int) -> "fdl.Partial[Any]":
    model = _model(num_layers, hidden_size, vocab_size_multiple=16)
    model.mamba_version = 2
    model.mamba_state_dim = 128
    model.mamba_head_dim = 64
    model.mamba_num_groups = 1
    model.mamba_chunk_size = 256
    return _recipe(name, model, lr, micro_batch_size)


def _mamba1(name: str, num_layers: int, hidden_size: int, lr: float, micro_batch_size: int) -> "fdl.Partial[Any]":
    model = _model(num_layers, hidden_size, vocab_size_multiple=8)
    model.mamba_version = 1
    model.mamba_state_dim = 16
    return _recipe(name, model, lr, micro_batch_size)


def _model(num_layers: int, hidden_size: int, vocab_size_multiple: int) -> "fdl.Config[ModelConfig]":
    return config(
        ModelConfig,
        layer_pattern="M" * num_layers,
        hidden_size=hidden_size,
        vocab_size=50277,
        vocab_size_multiple=vocab_size_multiple,
        tie_embeddings=True,
    )


def _recipe(name: str, model: "fdl.Config[ModelConfig]", lr: float, micro_batch_size: int) -> "fdl.Partial[Any]":
    return partial(
        pretrain,
        name=name,
        model=model,
        parallel=parts.tensor_parallel(1),
        data=parts.indexed(SEQUENCE_LENGTH, TOKENIZER),
        optimizer=config(
            OptimizerConfig,
            lr=lr,
            min_lr=1e-5,
            schedule="cosine",
            warmup_samples=375_000_000 // SEQUENCE_LENGTH,  # GPT-3's 375M tokens
        ),
        trainer=config(
            TrainerConfig,
            max_samples=300_000_000_000 // SEQUENCE_LENGTH,
            micro_batch_size=micro_batch_size,
            # GPT-3's batches: 1M tokens for the largest of these sizes, 0.5M for the others.
            global_batch_size=512 if model.hidden_size == 2560 else 256,
        ),
        checkpoint=parts.checkpoints_every(2000),
    )
