"""The runs that the GPU repeats: a small hybrid of each Mamba version, and one with experts and multi-token prediction.

On the CPU, two steps and a checkpoint, from which all others start, and then fifty more.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid import settings_file
from hybrid.config import Settings
from tests import toy

START, STEPS = 2, 50
SIZES: dict[str, Any] = {
    "layer_pattern": "M-M*",
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "mamba_state_dim": 32,
    "mamba_head_dim": 16,
    "mamba_dt_rank": 16,  # with the states, a multiple of 16 for FP8
    "mamba_num_groups": 2,
    "mamba_chunk_size": 64,
    "vocab_size_multiple": 16,
    "init_std": 0.05,
}
MODELS: dict[str, dict[str, Any]] = {
    "Mamba-1": {"mamba_version": 1},
    "Mamba-2": {"mamba_version": 2},
    "Mamba-2, experts, MTP": {
        "mamba_version": 2,
        "layer_pattern": "MEM*/M*",
        "num_experts": 4,
        "moe_ffn_hidden_size": 128,
        "moe_shared_expert_size": 128,
    },
}


def on_cpu(folder: Path, model: str) -> list[Settings]:
    """Two settings of one run: to its first checkpoint, and on to its end."""
    first = toy.settings(
        folder / model,
        "cpu",
        steps=START,
        model={**SIZES, **MODELS[model]},
        data={"sequence_length": 128, "cache": str(folder / model / "cache")},
        trainer={"micro_batch_size": 4, "global_batch_size": 8},
        checkpoint={"save_interval": 10 * STEPS},
    )
    return [first, replace(first, trainer=replace(first.trainer, max_steps=START + STEPS))]


def checkpoint(run: Settings) -> Path:
    """Where a run has the checkpoint that all start from."""
    return Path(run.folder) / run.name / f"checkpoints/iter_{START:07}"


def take_up(cpu: Settings, run: Settings) -> None:
    """Give a run the checkpoint of the CPU's as its own. Its settings beside it say that it is the same run."""
    shutil.copytree(checkpoint(cpu), checkpoint(run))
    settings_file.write(run, Path(run.folder) / run.name)
