"""`hybrid convert` against `cp` of the same bytes on the same disk, and against Megatron-LM's hybrid_conversion.py.

    python benchmarks/convert.py [--folder DIR] [--layers N] [--runs N] [--optimizer-layers N]
                                 [--upstream SCRIPT --upstream-layers N]

Makes a legacy checkpoint of one rank in the shape of the 8B hybrid (256,000 tokens, hidden size 4096; all 56 layers are
17.3 GB in bfloat16) under DIR, then measures: `cp -r` and sync; conversion to tensor parallel 4 x pipeline parallel 2,
to Hugging Face and to torch_dist; the same with optimizer state on a smaller checkpoint of 32,000 tokens; `hybrid
inspect`. Everything is written to the disk before the clock stops. The ways take turns; medians are printed, as a table
for benchmarks/convert.md. DIR needs room for about twice the checkpoint.

SCRIPT is tools/checkpoint/hybrid_conversion.py of a checkout of NVIDIA/Megatron-LM. It does not run as it is: torch 2.6
and later refuse to load its input, so it is given a torch.load that does not. It reads the names of 2024 alone, so the
checkpoint has those. It holds the model in memory and writes several times its bytes, so it is measured, with cp and
`hybrid convert` beside it, on N layers.
"""

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from converters import arguments, layout, naming, output, torchfile
from converters.checkpoint import SLOTS, Checkpoint, Optimizer
from converters.tensors import Tensor, cat, reshape, stored
from hybrid.config import ModelConfig

PATTERN = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
MODEL = ModelConfig(
    layer_pattern=PATTERN,
    hidden_size=4096,
    ffn_hidden_size=16384,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=256000,
)
LAYOUT = ("--tensor-parallel", 4, "--pipeline-parallel", 2)
OPTIMIZER_VOCABULARY = 32_000
NOISE_BYTES = 64 << 20
UPSTREAM = """
import runpy, sys, torch
load = torch.load
sys.argv = sys.argv[1:]
torch.load = lambda *a, **k: load(*a, **{**k, "weights_only": False})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Measured:
    """Seconds of the wall and of the processor, and the largest memory that is not a mapped file's, in bytes."""

    seconds: float
    cpu: float
    memory: int
    written: int = 0


def noise(shape: tuple[int, ...], dtype: str, file: Path, start: int = 0) -> Tensor:
    """A tensor of random bytes, from byte `start` of the file on, which repeat after NOISE_BYTES."""
    size = 1
    for length in shape:
        size *= length
    item = {"bfloat16": 2, "float32": 4}[dtype]
    if size * item <= NOISE_BYTES:
        return reshape(stored(file, start, (size,), dtype), shape)
    rows = NOISE_BYTES // item // (size // shape[0])
    parts: list[Tensor] = []
    left = shape[0]
    while left:
        taken = min(rows, left)
        parts.append(stored(file, start, (taken, *shape[1:]), dtype))
        left -= taken
    return cat(parts, 0)


def name_of_2024(name: str) -> str:
    return name.replace("mixer.in_proj.layer_norm_weight", "norm.weight")


def make_source(folder: Path, layers: int, optimizer: bool) -> int:
    """Write the checkpoint that everything starts from; return its tensors' bytes."""
    model = replace(MODEL, layer_pattern=PATTERN[:layers])
    if optimizer:
        model = replace(model, vocab_size=OPTIMIZER_VOCABULARY)
    file = folder.parent / "noise"
    if not file.exists():
        file.write_bytes(os.urandom(NOISE_BYTES + 4096))
    params = naming.parameters(model)
    weights = {name: noise(param.shape, "bfloat16", file) for name, param in params.items()}
    source = Checkpoint(folder, "megatron", model, weights, iteration=100)
    args = arguments.from_model(source, layout.target(model), 128)
    content = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 100,
        "rng_state": [],
        "model": {name_of_2024(name): tensor for name, tensor in weights.items()},
    }
    if optimizer:
        from converters import legacy_optimizer

        # Equal tensors would be stored once.
        slots = {
            slot: {name: noise(param.shape, "float32", file, 64 * number) for name, param in params.items()}
            for number, slot in enumerate(SLOTS, start=1)
        }
        groups = [{"wd_mult": wd, "lr": 1e-4, "step": 100} for wd in (1.0, 0.0)]
        content["optimizer"] = legacy_optimizer.content(
            Optimizer(slots, groups), [weights], {slot: [of] for slot, of in slots.items()}, 1
        )
    rank = "iter_0000100/mp_rank_00/model_optim_rng.pt"
    files = {rank: torchfile.plan(content), "latest_checkpointed_iteration.txt": torchfile.bytes_plan(b"100")}
    shutil.rmtree(folder, ignore_errors=True)
    with output.replacing(folder, output.total_bytes(files)) as part:
        output.write(part, files)
    return sum(part.nbytes for part in files[rank].parts)


def run(command: list[str], written: Path) -> Measured:
    """Run a command, sampling its memory, then sync what it wrote."""
    os.sync()
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, ended = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            held = [int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem"))]
            peak = max(peak, 1024 * sum(held))

    watcher = threading.Thread(target=sample)
    watcher.start()
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = code
    ended.set()
    watcher.join()
    assert code == 0, command
    os.sync()
    seconds = time.monotonic() - start
    size = sum(path.stat().st_size for path in written.rglob("*") if path.is_file()) if written.exists() else 0
    return Measured(seconds, usage.ru_utime + usage.ru_stime, peak, size)


def hybrid(*words: object) -> list[str]:
    return [str(Path(sys.executable).with_name("hybrid")), *map(str, words)]


def compare(title: str, ways: dict[str, list[str]], out: Path, nbytes: int, runs: int) -> None:
    """Measure the ways in turn and print a table; the first is the measure of the others."""
    results: dict[str, list[Measured]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, command in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            results[name].append(run(command, out))
    shutil.rmtree(out, ignore_errors=True)
    print(f"\n{title} ({nbytes / 1e9:.2f} GB of tensors, {runs} runs)\n")
    print("| | wall s | GB/s | of cp | CPU s | peak memory | bytes written |")
    print("|---|---|---|---|---|---|---|")
    base = statistics.median(m.seconds for m in next(iter(results.values())))
    for name, found in results.items():
        seconds = statistics.median(m.seconds for m in found)
        cpu = statistics.median(m.cpu for m in found)
        memory = max(m.memory for m in found)
        over = found[0].written / nbytes - 1
        print(
            f"| {name} | {seconds:.1f} | {nbytes / seconds / 1e9:.2f} | {base / seconds:.0%} | {cpu:.1f} | "
            f"{memory / 2**20:.0f} MiB | {over:+.2%} |",
            flush=True,
        )


def startup(path: Path, runs: int) -> None:
    """How long inspect takes, beside the interpreter alone."""
    print("\n| | wall s | CPU s |\n|---|---|---|")
    for name, command in {
        "python -c pass": [sys.executable, "-c", "pass"],
        "hybrid inspect": hybrid("inspect", path),
    }.items():
        found = [run(command, Path("/nonexistent")) for _ in range(max(5, runs))]
        wall, cpu = statistics.median(m.seconds for m in found), statistics.median(m.cpu for m in found)
        print(f"| {name} | {wall:.2f} | {cpu:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("convert-benchmark"))
    parser.add_argument("--layers", type=int, default=56)
    parser.add_argument("--optimizer-layers", type=int, default=0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--upstream", type=Path)
    parser.add_argument("--upstream-layers", type=int, default=12)
    options = parser.parse_args()
    folder, out = options.folder.absolute(), options.folder.absolute() / "out"
    folder.mkdir(parents=True, exist_ok=True)
    names = ("hybrid-recipes", "torch", "numpy", "safetensors")
    print(f"{datetime.date.today()}, {platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in names))
    source = folder / "source"
    nbytes = make_source(source, options.layers, optimizer=False)
    ways = {
        "cp -r": ["cp", "-r", str(source), str(out)],
        "TP4 x PP2": hybrid("convert", source, out, "--to", "megatron", *LAYOUT),
        "Hugging Face": hybrid("convert", source, out, "--to", "hf"),
        "torch_dist": hybrid("convert", source, out, "--to", "torch_dist", *LAYOUT[:2]),
    }
    compare(f"The 8B hybrid, {options.layers} of 56 layers, one rank to", ways, out, nbytes, options.runs)
    startup(source, options.runs)
    if options.upstream:
        nbytes = make_source(source, options.upstream_layers, optimizer=False)
        upstream = [sys.executable, "-c", UPSTREAM, str(options.upstream), "--load-dir", str(source)]
        upstream += ["--save-dir", str(out), "--target-tp-size", "4", "--target-pp-size", "2"]
        ways = {
            "cp -r": ["cp", "-r", str(source), str(out)],
            "TP4 x PP2": hybrid("convert", source, out, "--to", "megatron", *LAYOUT),
            "Megatron-LM's hybrid_conversion.py, TP4 x PP2": upstream,
        }
        compare(f"{options.upstream_layers} of 56 layers, one rank to", ways, out, nbytes, options.runs)
    if options.optimizer_layers:
        nbytes = make_source(source, options.optimizer_layers, optimizer=True)
        ways = {
            "cp -r": ["cp", "-r", str(source), str(out)],
            "TP4 x PP2": hybrid("convert", source, out, "--to", "megatron", "--optimizer", *LAYOUT),
            "torch_dist": hybrid("convert", source, out, "--to", "torch_dist", "--optimizer", *LAYOUT[:2]),
        }
        title = f"With optimizer state, {options.optimizer_layers} of 56 layers, one rank to"
        compare(title, ways, out, nbytes, options.runs)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
