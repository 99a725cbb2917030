"""megatron-core on four processes, tensor parallel 2 and pipeline parallel 2, loads what is written here, strictly."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from converters import convert
from hybrid.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Settings,
    TrainerConfig,
)

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
PROGRAM = Path(__file__).parent / "four_ranks.py"
TOLERANCE = 1e-5
"""On logits in float32 of magnitude 1: tensor parallelism sums in another order."""


def single(model: ModelConfig) -> Settings:
    return Settings(
        name="test",
        model=replace(model, layer_pattern=model.pattern.layers),
        parallel=ParallelConfig(),
        data=DataConfig(sequence_length=64),
        optimizer=OptimizerConfig(),
        trainer=TrainerConfig(precision="fp32", max_steps=1),
        checkpoint=CheckpointConfig(),
    )


@pytest.mark.parametrize("form", ["torch_dist", "megatron"])
def test_the_same_logits_from_four_ranks(
    tmp_path: Path, make_model: Callable[..., Any], make_weights: Callable[..., Any], make_legacy: Any, form: str
) -> None:
    from hybrid.model.build import build_model, transformer_config
    from hybrid.training import distributed

    model = make_model("hybrid", vocab_size_multiple=16)
    weights = {
        name: 1 + 0.1 * tensor if "norm" in name else 0.3 * tensor
        for name, tensor in make_weights(model, dtype=torch.float32).items()
    }
    source = make_legacy(tmp_path / "source", model, weights)
    tokens = torch.randint(0, 250, (2, 23), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    layout: dict[str, Any] = {"tensor": 2, "pipeline": 2, "layer_pattern": "M-M|*-"}
    convert.convert(
        source, tmp_path / "a", form, fused_norms=form != "megatron", overrides={"activation": "squared_relu"}, **layout
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(PROGRAM)]
    command += [form, str(tmp_path / "a"), str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, timeout=600)

    opened = convert.open_checkpoint(tmp_path / "a")
    settings = single(opened.model)
    distributed.start(ParallelConfig(), None, 1)
    whole: Any = build_model(
        settings, transformer_config(settings, settings.model.pattern), settings.model.pattern
    ).eval()
    (state,) = convert.rank_state(opened, fused_norms=False)
    whole.load_state_dict(state, strict=False)
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    with torch.no_grad():
        expected = whole(tokens, positions, None)
    distributed.stop()
    logits = torch.load(tmp_path / "logits.pt")
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()
