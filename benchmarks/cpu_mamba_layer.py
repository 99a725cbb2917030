"""Training speed of the Mamba layers on CPU, beside transformers' Mamba-2 layer in PyTorch.

    python benchmarks/cpu_mamba_layer.py [--rounds N] [--clock wall|cpu]

Prints the tables of benchmarks/cpu_mamba_layer.md. Figures to reach: the Mamba-2 layer (forward and backward, sequence
1024, width 256) at least 3 times as fast as transformers' `Mamba2Mixer`; one training step of `tiny` with Mamba-1 at
most 4 times as long as with Mamba-2.

The peer has the same weights and gives the same output (checked here). It is measured with its default chunk of 256 and
with the 64 that this project takes on CPU, though nothing in transformers sets that. Whoever is compared takes turns in
one process. The wall clock counts on all cores of an idle machine; the CPU time of one thread counts on a busy one,
where a wait for a core that is taken would be measured otherwise.
"""

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid.config import ParallelConfig, Settings
from hybrid.model.build import build_model, transformer_config
from hybrid.training import distributed
from hybrid.training.setup import set_up
from recipes import apply, resolve, settings

LENGTH, WIDTH = 1024, 256
# heads, head width, groups, state: the proportions of Mamba-2's paper (state 128, heads of 64, one group), and smaller
# heads in two groups, as `tiny` has them.
LAYERS = [(8, 64, 1, 128), (16, 32, 2, 64)]
BATCHES = [1, 4]


def tiny(**model: Any) -> Settings:
    """Settings of `tiny` in float32 on one process, with some of the model's fields replaced."""
    return settings(apply(resolve("tiny"), [f"model.{name}={value}" for name, value in model.items()]))


def make_ours(heads: int, head_dim: int, groups: int, state: int) -> Any:
    """The mixer of a model with one Mamba-2 layer."""
    run = tiny(hidden_size=WIDTH, mamba_head_dim=head_dim, mamba_num_groups=groups, mamba_state_dim=state)
    run.model.layer_pattern, run.model.mamba_num_heads, run.model.mamba_chunk_size = "M", heads, 64
    pattern = run.model.pattern
    model: Any = build_model(run, transformer_config(run, pattern), pattern)
    return model.decoder.layers[0].mixer


def make_peer(ours: Any, heads: int, head_dim: int, groups: int, state: int, chunk: int) -> Any:
    """transformers' layer with the same weights."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=WIDTH,
        num_heads=heads,
        head_dim=head_dim,
        n_groups=groups,
        state_size=state,
        chunk_size=chunk,
        layer_norm_epsilon=ours.norm.eps,
        num_hidden_layers=1,
    )
    peer = Mamba2Mixer(config, layer_idx=0)
    weights = {name.replace("conv1d_", "conv1d."): value for name, value in ours.state_dict().items()}
    peer.load_state_dict({name: value for name, value in weights.items() if "_extra_state" not in name})
    return peer


def training_pass(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward to the input and all weights."""

    def run() -> None:
        layer(x).backward(dy)
        x.grad = None

    return run


def take_turns(runs: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if number:
                times[name].append(1000 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def compare_layers(rounds: int, clock: Callable[[], float]) -> None:
    print("| layer (heads x width, groups, state) | batch | this project (ms) | transformers (ms) | ratio ", end="")
    print("| transformers, chunk 64 (ms) | ratio |\n|---|---|---|---|---|---|---|")
    for sizes in LAYERS:
        ours = make_ours(*sizes)
        peers = {chunk: make_peer(ours, *sizes, chunk=chunk) for chunk in (256, 64)}
        for batch in BATCHES:
            x, dy = torch.randn(batch, LENGTH, WIDTH), torch.randn(batch, LENGTH, WIDTH)
            # Megatron's layers have positions first.
            x_ours, dy_ours = x.transpose(0, 1).contiguous(), dy.transpose(0, 1).contiguous()
            with torch.no_grad():
                expected = peers[256](x)
                torch.testing.assert_close(ours(x_ours)[0].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
            runs = {"ours": training_pass(lambda x, ours=ours: ours(x)[0], x_ours.requires_grad_(), dy_ours)}
            x.requires_grad_()
            runs |= {f"chunk {chunk}": outside(training_pass(peer, x, dy)) for chunk, peer in peers.items()}
            ms = take_turns(runs, rounds, clock)
            heads, head_dim, groups, state = sizes
            print(f"| {heads} x {head_dim}, {groups}, {state} | {batch} | {ms['ours']:.1f} ", end="")
            for chunk in (256, 64):
                print(f"| {ms[f'chunk {chunk}']:.1f} | {ms[f'chunk {chunk}'] / ms['ours']:.2f} ", end="")
            print("|", flush=True)


def outside(run: Callable[[], None]) -> Callable[[], None]:
    """Without the mode in which megatron-core runs on the CPU, which costs every call from Python a little."""

    def bare() -> None:
        with torch._C.DisableTorchFunction():
            run()

    return bare


def compare_steps(rounds: int, clock: Callable[[], float]) -> None:
    runs: dict[str, Callable[[], None]] = {}
    for mamba_version in (2, 1):
        run = tiny(mamba_version=mamba_version)
        training = set_up(run, run.model.pattern, torch.device("cpu"))
        tokens = torch.randint(run.model.vocab_size, (run.trainer.global_batch_size, run.data.sequence_length))
        positions = torch.arange(run.data.sequence_length).expand_as(tokens)

        def step(training: Any = training, tokens: Tensor = tokens, positions: Tensor = positions) -> None:
            (model,) = training.chunks
            model.zero_grad_buffer()
            training.optimizer.zero_grad()
            model(tokens, positions, None, labels=tokens).mean().backward()
            model.finish_grad_sync()
            training.optimizer.step()

        runs[f"Mamba-{mamba_version}"] = step
    ms = take_turns(runs, rounds, clock)
    sizes = run.model
    print("| step of `tiny` (ms) | Mamba-2 | Mamba-1 | ratio |\n|---|---|---|---|")
    print(
        f"| width {sizes.hidden_size}, state {sizes.mamba_state_dim}, {tokens.numel()} tokens | {ms['Mamba-2']:.0f} "
        f"| {ms['Mamba-1']:.0f} | {ms['Mamba-1'] / ms['Mamba-2']:.2f} |",
        flush=True,
    )


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=["wall", "cpu"], help="one of the two; default: both")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    distributed.start(ParallelConfig(), None, seed=1234)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    print(f"{date.today()}, {processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python ", end="")
    print(f"{platform.python_version()}, {versions}; float32, medians of {options.rounds} rounds")
    clocks = {
        "wall": (f"Wall clock, {torch.get_num_threads()} threads", torch.get_num_threads(), time.perf_counter),
        "cpu": ("CPU time of one thread", 1, time.process_time),
    }
    for name, (title, threads, clock) in clocks.items():
        if options.clock in (None, name):
            torch.set_num_threads(threads)
            print(f"\n{title}:\n")
            compare_layers(options.rounds, clock)
            print()
            compare_steps(options.rounds, clock)
    distributed.stop()


if __name__ == "__main__":
    main()
