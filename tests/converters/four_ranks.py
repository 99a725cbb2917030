"""One of four ranks (tensor parallel 2, pipeline parallel 2): load a converted checkpoint strictly, give its logits.

Started by test_megatron_ranks.py under torchrun: four_ranks.py torch_dist|megatron FOLDER TOKENS OUTPUT
"""

import sys
from pathlib import Path
from typing import Any

import hybrid.quiet  # noqa: F401

# isort: split
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from converters import convert
from hybrid.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    Settings,
    TrainerConfig,
)
from hybrid.model.build import build_model, transformer_config
from hybrid.pattern import parse
from hybrid.training import distributed

PATTERN = "M-M|*-"


def main(form: str, folder: Path, tokens_file: str, output: str) -> None:
    """Run this rank."""
    opened = convert.open_checkpoint(folder)
    settings = Settings(
        name="test",
        model=opened.model,
        parallel=ParallelConfig(tensor=2, pipeline=2),
        data=DataConfig(sequence_length=64),
        optimizer=OptimizerConfig(),
        trainer=TrainerConfig(precision="fp32", max_steps=1),
        checkpoint=CheckpointConfig(),
    )
    distributed.start(settings.parallel, None, 1)
    first, last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
    pattern = parse(PATTERN)
    model: Any = build_model(
        settings, transformer_config(settings, pattern), pattern, pre_process=first, post_process=last
    ).eval()
    if form == "torch_dist":
        loaded: Any = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "iter_0000100"))
        model.load_state_dict(loaded["model"], strict=True)
    else:
        rank = f"mp_rank_{mpu.get_tensor_model_parallel_rank():02d}_{mpu.get_pipeline_model_parallel_rank():03d}"
        content = torch.load(folder / "iter_0000100" / rank / "model_optim_rng.pt", weights_only=False)
        extra = {name: value for name, value in model.state_dict().items() if name.endswith("_extra_state")}
        model.load_state_dict(content["model"] | extra, strict=True)

    tokens = torch.load(tokens_file)
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    shape = (tokens.shape[1], tokens.shape[0], opened.model.hidden_size)
    with torch.no_grad():
        if not first:
            received = torch.empty(shape)
            dist.recv(received, mpu.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(received)
        out = model(tokens, positions, None)
        if not last:
            dist.send(out.contiguous(), mpu.get_pipeline_model_parallel_next_rank())
        else:
            logits = gather_from_tensor_model_parallel_region(out)
            if mpu.get_tensor_model_parallel_rank() == 0:
                torch.save(logits, output)
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4])
