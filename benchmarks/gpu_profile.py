"""Where the time of a training step goes on one GPU, by kind of kernel.

    python benchmarks/gpu_profile.py RECIPE [key=value ...]

Trains on made-up data, lets the first steps pass, and adds up the kernels of one step as PyTorch's profiler saw them.
"""

import re
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from typing import Any

import hybrid.quiet  # noqa: F401

# isort: split
import torch
from torch.profiler import ProfilerActivity, profile

from hybrid.costs.pipeline import stage_pattern
from hybrid.data.datasets import build_datasets
from hybrid.data.tokenizer import load_tokenizer
from hybrid.training.distributed import start, stop
from hybrid.training.faults import Judge
from hybrid.training.metrics import Clock
from hybrid.training.setup import set_up
from hybrid.training.step import Stepper, micro_batch_loader
from recipes import apply, resolve, settings

KINDS = (
    ("Mamba-2 scan, backward", r"_chunk_scan_bwd|_chunk_state_bwd|_state_passing_bwd|_bmm_chunk_bwd|_chunk_cumsum_bwd"),
    ("Mamba-2 scan, forward", r"_chunk_scan_fwd|_chunk_state_fwd|_state_passing_fwd|_bmm_chunk_fwd|_chunk_cumsum_fwd"),
    ("Mamba-1 scan", r"selective_scan"),
    ("causal convolution", r"causal_conv1d|channellast"),
    ("attention", r"fmha|flash|sdpa|cudnn.*attn|attention"),
    ("cross entropy", r"cross_entropy|online_softmax|element_mul"),
    ("optimizer", r"adam|multi_tensor|l2norm"),
    ("norms", r"norm|_layer_norm"),
    ("FP8 casts and scales", r"amax|cast|quantize|scale"),
    ("matrix products", r"nvjet|gemm|cutlass|cublas|xmma|sm90_"),
    ("activations", r"gelu|silu|relu|swiglu"),
    ("copies, sums and other elementwise", r"elementwise|copy|memcpy|memset|transpose|cat|reduce|index|fill|_kernel"),
)


def main() -> None:
    recipe = apply(
        resolve(sys.argv[1]),
        [
            "parallel=single",
            "data=mock",
            "optimizer.warmup_samples=0",
            "optimizer.decay_samples=None",
            "trainer.max_steps=8",
            *sys.argv[2:],
            f"folder={tempfile.mkdtemp()}",
        ],
    )
    run = settings(recipe)
    world = start(run.parallel, None, run.trainer.seed)
    tokenizer = load_tokenizer(run.data.tokenizer)
    datasets = build_datasets(run, tokenizer, train_samples=run.trainer.samples, validation_samples=1)
    training = set_up(run, stage_pattern(run), world.device)
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(world.device)
    data: Any = [iter(micro_batch_loader(run, datasets.train))]
    stepper = Stepper(run, training, token_bytes, world, Clock(), Judge(run.faults))

    def step(number: int) -> float:
        torch.cuda.synchronize()
        began = time.monotonic()
        stepper.step(data, number + 1, run.trainer.global_batch_size)
        torch.cuda.synchronize()
        return time.monotonic() - began

    seconds = [step(number) for number in range(5)][-1]
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(5)
    times: Counter[str] = Counter()
    names: dict[str, Counter[str]] = {}
    for event in profiler.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kind = next((kind for kind, words in KINDS if re.search(words, event.name, re.IGNORECASE)), "other")
            times[kind] += event.device_time_total / 1e3
            names.setdefault(kind, Counter())[event.name[:70]] += event.device_time_total / 1e3
    print(f"{date.today()}, {torch.cuda.get_device_name()}, {' '.join(sys.argv[1:])}")
    print(f"step {seconds * 1e3:.0f} ms without the profiler\n\n| kind of kernel | ms | share |\n|---|---|---|")
    for kind, spent in times.most_common():
        print(f"| {kind} | {spent:.0f} | {spent / 10 / seconds:.1f}% |")
    idle = seconds * 1e3 - sum(times.values())
    print(f"| waiting for the host (negative: kernels overlap) | {idle:.0f} | {idle / 10 / seconds:.1f}% |")
    for kind in names:
        longest = ", ".join(f"{name} {spent:.0f}" for name, spent in names[kind].most_common(4))
        print(f"    {kind}: {longest}", file=sys.stderr)
    stop()


if __name__ == "__main__":
    main()
