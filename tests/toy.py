"""A run small enough for a test: a hybrid of three layer kinds on a package of the standard library.

`python -m tests.toy SETTINGS.json...` runs the training that each file describes, one after the other, as one rank;
tests start it under torchrun. A run whose name starts with "moved" has each weight moved by -1, 0 or 1 unit in the last
place once its checkpoint is loaded; in one that is called "hangs", rank 1 never gets past its third batch. It imports
torch only when it runs.
"""

import json
import os
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid import settings_file
from hybrid.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Settings,
    TrainerConfig,
)

ROOT = Path(__file__).parent.parent
MODEL = ModelConfig(
    layer_pattern="M-M*",
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    mamba_state_dim=16,
    mamba_head_dim=16,
    mamba_num_groups=2,
    mamba_chunk_size=16,
    vocab_size=257,
    vocab_size_multiple=4,
)


def settings(folder: Path, name: str = "toy", *, steps: int = 4, **sections: dict[str, Any]) -> Settings:
    """Settings of a toy run in `folder`; `model={"hidden_size": 64}` and the like replace single fields."""
    toy = Settings(
        name=name,
        folder=str(folder / "runs"),
        model=MODEL,
        parallel=ParallelConfig(),
        data=DataConfig(
            source="text",
            # Part of the standard library: the same files in every test of one Python.
            path=str(Path(sysconfig.get_paths()["stdlib"]) / "email"),
            sequence_length=64,
            cache=str(folder / "cache"),
            num_workers=0,
        ),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4),
        trainer=TrainerConfig(
            max_steps=steps, micro_batch_size=2, global_batch_size=4, precision="fp32", eval_interval=0, eval_steps=2
        ),
        checkpoint=CheckpointConfig(save_interval=2, keep_last=0),
    )
    return replace(toy, **{name: replace(getattr(toy, name), **values) for name, values in sections.items()})


def metrics(run: Settings, key: str = "loss") -> dict[int, float]:
    """A metric of each step, as metrics.jsonl has it."""
    lines = (Path(run.folder) / run.name / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line[key] for line in map(json.loads, lines) if key in line}


def start(
    runs: list[Settings], processes: int = 1, environment: dict[str, str] | None = None, **kwargs: Any
) -> "subprocess.CompletedProcess[str]":
    """Run these settings in other processes, one run after the other; fails if they fail."""
    files = []
    for number, run in enumerate(runs):
        path = Path(run.folder) / f"{number}_{run.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings_file.to_dict(run)))
        files.append(str(path))
    return spawn("tests.toy", files, processes, environment, **kwargs)


def spawn(
    module: str, arguments: list[str], processes: int = 1, environment: dict[str, str] | None = None, **kwargs: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a module in other processes, as the ranks of one job; fails if it fails."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {}), "PYTHONPATH": path}
    done = subprocess.run(
        [*command, module, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        **{"timeout": 600, **kwargs},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-9000:]
    return done


def _load_and_move(load: Any, run: Settings) -> Any:
    """Wrap `checkpoint.load` for a run whose start is to differ from another's by one rounding a weight."""
    import torch

    def moved(path: Path, settings: Settings, training: Any) -> Any:
        position = load(path, settings, training)
        generator = torch.Generator().manual_seed(int(run.name.split()[1]))
        with torch.no_grad():
            for parameter in training.chunks[0].parameters():
                bits = parameter.data.view(torch.int32)
                bits += torch.randint(-1, 2, bits.shape, generator=generator, dtype=torch.int32)
        return position

    return moved


def join(number: int) -> None:
    """Join the other ranks for the `number`th run of this process: each run needs names of its own in their store."""
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=dist.PrefixStore(f"run {number}", store), rank=rank, world_size=size)


def _hang() -> None:
    """Have rank 1 sleep when it has its third batch."""
    from hybrid.training import step

    pack, seen = step.pack, []

    def hang_in_the_third_batch(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 3 and os.environ.get("RANK") == "1":
            time.sleep(3600)
        return pack(*arguments)

    step.pack = hang_in_the_third_batch


def run(settings: Settings) -> None:
    """Train, as one rank of processes that have joined."""
    from hybrid.training import checkpoint
    from hybrid.training.loop import train

    load = checkpoint.load
    if settings.name.startswith("moved"):
        checkpoint.load = _load_and_move(load, settings)
    try:
        train(settings)
    finally:
        checkpoint.load = load


def _main(files: list[str]) -> None:
    import hybrid.quiet  # noqa: F401

    for number, file in enumerate(files):
        join(number)
        settings = settings_file.from_dict(json.loads(Path(file).read_text()), file)
        if settings.name == "hangs":
            _hang()
        run(settings)


if __name__ == "__main__":
    _main(sys.argv[1:])
