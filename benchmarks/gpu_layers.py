"""Mamba layers of this project beside mamba-ssm's own modules and upstream's mixer, forward and backward, on one GPU.

    python benchmarks/gpu_layers.py [--mamba 1|2]

bf16, 8B-shaped layers (hidden 4096), 4096 positions. Every time is the median of 20 repetitions after 5 that are not
counted, by CUDA events; the peer is measured right after in the same process.
"""

import argparse
import statistics
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hybrid.quiet  # noqa: F401

# isort: split
import torch

from hybrid.config import ParallelConfig
from hybrid.costs.pipeline import stage_pattern
from hybrid.model import specs
from hybrid.model.build import build_model, transformer_config
from hybrid.model.kernels import machine
from hybrid.training.distributed import start, stop
from tests import toy

HIDDEN, LENGTH = 4096, 4096


def milliseconds(function: Any, hidden: torch.Tensor) -> tuple[float, float]:
    """Medians of the forward pass, and of forward and backward."""
    forward, both = [], []
    gradient = torch.randn_like(function(hidden))
    for repetition in range(25):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        events[0].record()
        output = function(hidden)
        events[1].record()
        output.backward(gradient)
        events[2].record()
        torch.cuda.synchronize()
        if repetition >= 5:
            forward.append(events[0].elapsed_time(events[1]))
            both.append(events[0].elapsed_time(events[2]))
    return statistics.median(forward), statistics.median(both)


def mixer(version: int, state: int, upstream: bool = False) -> Any:
    """A Mamba mixer of an 8B-shaped layer; its input projection holds the norm of the input."""
    settings = toy.settings(
        Path("."),
        model={
            "layer_pattern": "M",
            "hidden_size": HIDDEN,
            "num_attention_heads": 32,
            "mamba_version": version,
            "mamba_state_dim": state,
            "mamba_head_dim": 64,
            "mamba_num_groups": 8,
            "mamba_chunk_size": 128,
        },
        trainer={"precision": "bf16"},
    )
    pattern = stage_pattern(settings)
    if upstream:
        from megatron.core.ssm.mamba_mixer import MambaMixer

        ours, specs.FusedMamba2Mixer = specs.FusedMamba2Mixer, MambaMixer  # type: ignore[misc]
        try:
            model: Any = build_model(settings, transformer_config(settings, pattern), pattern)
        finally:
            specs.FusedMamba2Mixer = ours  # type: ignore[misc]
    else:
        model = build_model(settings, transformer_config(settings, pattern), pattern)
    return model.decoder.layers[0].mixer.bfloat16()


def mamba1_module(state: int) -> Any:
    """mamba-ssm's Mamba: its input projection, then `mamba_inner_fn`."""
    from mamba_ssm.modules.mamba_simple import Mamba  # pyright: ignore[reportMissingImports]

    return Mamba(HIDDEN, d_state=state, d_conv=4, expand=2, device="cuda", dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mamba", type=int, choices=[1, 2], help="only this version; default: both")
    wanted = parser.parse_args().mamba
    start(ParallelConfig(), None, 1)
    print(f"{date.today()}, {machine().gpu}, torch {torch.__version__}, {machine().versions}")
    print("megatron-core", version("megatron-core"))
    print("| layer | batch | forward, ms | with backward, ms | peer | forward, ms | with backward, ms | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in (1, 4):
        hidden = torch.randn(LENGTH, batch, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for kind, state in ((1, 16), (1, 128), (2, 128)):
            if wanted not in (None, kind):
                continue
            layer = mixer(kind, state)
            own = milliseconds(lambda x, layer=layer: layer(x)[0], hidden)
            del layer
            if kind == 1:
                module, name = mamba1_module(state), "mamba_ssm.Mamba"
                rows = hidden.detach().transpose(0, 1).contiguous().requires_grad_()
                peer = milliseconds(module, rows)
            else:
                module, name = mixer(kind, state, upstream=True), "megatron-core's MambaMixer"
                peer = milliseconds(lambda x, layer=module: layer(x)[0], hidden)
            del module
            torch.cuda.empty_cache()
            print(
                f"| Mamba-{kind}, state {state} | {batch} | {own[0]:.2f} | {own[1]:.2f} | {name} | {peer[0]:.2f} | "
                f"{peer[1]:.2f} | {own[1] / peer[1]:.2f} |",
                flush=True,
            )
    stop()


if __name__ == "__main__":
    main()
