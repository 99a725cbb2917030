"""What it costs that A_log, D and dt_bias are in bf16 in a bf16 model.

    python benchmarks/precision.py

The logits of a model of Mamba layers, on CPU with the PyTorch reference, beside those of the same weights in float32:
the norm of the difference over that of the logits: with only these three rounded to bf16, with everything in bf16, and
with everything but these three.
"""

import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import hybrid.quiet  # noqa: F401

# isort: split
import torch
from torch import Tensor

from hybrid.config import ParallelConfig
from hybrid.costs.pipeline import stage_pattern
from hybrid.model.build import build_model, transformer_config
from hybrid.training.distributed import start, stop
from tests import toy

LENGTH, SEEDS = 512, 3
SIZES: dict[str, Any] = {
    "layer_pattern": "MMMMMMMM",
    "hidden_size": 256,
    "mamba_state_dim": 64,
    "mamba_head_dim": 32,
    "mamba_num_groups": 2,
    "mamba_chunk_size": 64,
    "init_std": 0.1,
}


def is_one(name: str) -> bool:
    """Whether a parameter is A_log, D or the bias of the time step, of either Mamba version."""
    return name.endswith((".A_log", ".D", ".dt_bias", ".dt_proj.bias"))


def logits(model: Any, tokens: Tensor) -> Tensor:
    """(B, L, vocabulary) in float32."""
    with torch.no_grad():
        return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None).float()


def rounded(model: Any, which: Any) -> Any:
    """A copy with some parameters rounded to bf16, in the type they have."""
    other = build(model.mamba_version, "fp32")
    values = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        parameter.data = values[name].data.bfloat16().float() if which(name) else values[name].data
    return other


def in_bf16(model: Any, keep: bool) -> Any:
    """A copy in bf16; `keep`: but for the three."""
    other = build(model.mamba_version, "bf16").bfloat16()
    values = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        kind = torch.float32 if keep and is_one(name) else torch.bfloat16
        parameter.data = values[name].data.to(kind)
    return other


def build(mamba_version: int, precision: str) -> Any:
    """A model with new weights."""
    settings = toy.settings(
        Path(tempfile.gettempdir()),
        model={**SIZES, "mamba_version": mamba_version},
        data={"sequence_length": LENGTH},
        trainer={"precision": precision},
    )
    pattern = stage_pattern(settings)
    model: Any = build_model(settings, transformer_config(settings, pattern), pattern).eval()
    model.mamba_version = mamba_version
    return model


def main() -> None:
    print(f"{date.today()}, torch {torch.__version__}, megatron-core {version('megatron-core')}, CPU\n")
    print("| model | seed | the three in bf16 | everything in bf16 | everything but the three |\n|---|---|---|---|---|")
    for mamba_version in (2, 1):
        for seed in range(SEEDS):
            start(ParallelConfig(), None, seed + 1)
            model = build(mamba_version, "fp32")
            tokens = torch.randint(257, (2, LENGTH))
            expected = logits(model, tokens)
            others = (rounded(model, is_one), in_bf16(model, keep=False), in_bf16(model, keep=True))
            apart = [(logits(other, tokens) - expected).norm() / expected.norm() for other in others]
            print(
                f"| Mamba-{mamba_version} | {seed} | {' | '.join(f'{float(value):.1e}' for value in apart)} |",
                flush=True,
            )
            stop()


if __name__ == "__main__":
    main()
