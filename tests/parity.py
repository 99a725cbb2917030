"""One training in many layouts: what the parity test does for a few of them, and `benchmarks/parity.py` for all.

How far apart may two layouts be? They compute the same sums in another order, so they differ by rounding, and training
amplifies it. By how much is measured: more single-process runs start from weights that are each moved by at most one
unit in the last place, which is what one rounding does. Every operation of a step rounds, not only the weights, and a
layout changes the order of a few sums in each layer, so that a layout may be as far from the single process as
`MARGIN` times the farthest of these. The same holds for the gradient norm.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from hybrid import settings_file
from hybrid.config import Settings
from tests import lanes, toy
from tests.lanes import Phase

START, STEPS = 2, 20  # steps before the common checkpoint, and after it
MARGIN = 8
LIMIT = 7200  # seconds that all runs together may take
CHANGED = "changed.json"
MOVED = ("moved 0", "moved 1", "moved 2")

EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 32, "moe_shared_expert_size": 32}
LATENT: dict[str, Any] = {
    "mla_query_rank": 16,
    "mla_kv_rank": 16,
    "mla_head_dim": 8,
    "mla_rope_head_dim": 4,
    "mla_value_head_dim": 12,
}
DELTA: dict[str, Any] = {
    "gdn_num_key_heads": 4,
    "gdn_num_value_heads": 8,
    "gdn_key_head_dim": 8,
    "gdn_value_head_dim": 4,
}
# With few heads many positions score the same, 0, and which of them are taken hangs on their order.
SPARSE: dict[str, Any] = {"dsa_index_heads": 12, "dsa_index_head_dim": 8, "dsa_top_k": 16}
# Eight layers each, so that one cut into stages fits all.
MODELS: dict[str, dict[str, Any]] = {
    "Mamba-2": {"layer_pattern": "MMMMMMMM", "mamba_version": 2, "tie_embeddings": True},
    "Mamba-1": {"layer_pattern": "MMMMMMMM", "mamba_version": 1},
    "Mamba-2, attention, MLP": {
        "layer_pattern": "M-M*M-M*",
        "mamba_version": 2,
        "position_embedding": "rope",
        "rotary_percent": 0.5,
        "activation": "squared_relu",
    },
    "Mamba-1, attention, MLP": {
        "layer_pattern": "M-M*M-M*",
        "mamba_version": 1,
        "position_embedding": "learned",
        "normalization": "LayerNorm",
        "add_linear_bias": True,
    },
    "Mamba-2, latent attention, MLP": {"layer_pattern": "M-+M-+M+", "mamba_version": 2, **LATENT},
    "gated delta net, latent and sparse attention, MLP": {
        "layer_pattern": "G+-DG-+D",
        "activation": "swiglu",
        **LATENT,
        **DELTA,
        **SPARSE,
    },
    "Mamba-2, attention, MLP, MoE, MTP": {"layer_pattern": "MEM*M-ME/M*/M*", "mamba_version": 2, **EXPERTS},
    "Mamba-1, attention, MLP, MoE, MTP": {
        "layer_pattern": "MEM*M-ME/ME",
        "mamba_version": 1,
        "activation": "swiglu",
        **EXPERTS,
    },
}


@dataclass(frozen=True)
class Layout:
    """A split over some processes; `cut` has the main layers of each pipeline segment, none: cut for the user."""

    processes: int
    parallel: dict[str, Any] = field(default_factory=dict)
    cut: tuple[int, ...] = ()

    def fits(self, model: dict[str, Any]) -> bool:
        """Whether the checks would let the model have this layout."""
        if "E" not in model["layer_pattern"] and self.parallel.get("expert", 1) > 1:
            return False
        whole = self.parallel.get("tensor", 1) == 1 or self.parallel.get("sequence", False)
        return whole or not set("EGD+") & set(model["layer_pattern"])


SEQUENCE = {"tensor": 2, "sequence": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
VIRTUAL = (2, 2, 2, 2)
LAYOUTS: dict[str, Layout] = {
    "TP2": Layout(2, {"tensor": 2}),
    "TP2 + SP": Layout(2, SEQUENCE),
    "PP2": Layout(2, {"pipeline": 2}),
    "PP2, uneven": Layout(2, {"pipeline": 2}, (3, 5)),
    "VPP2": Layout(2, {"pipeline": 2}, VIRTUAL),
    "CP2": Layout(2, {"context": 2}),
    "DP2": Layout(2),
    "DP2, overlapped": Layout(2, OVERLAP),
    "EP2": Layout(2, {"expert": 2}),
    "PP4, uneven": Layout(4, {"pipeline": 4}, (1, 2, 3, 2)),
    "CP4": Layout(4, {"context": 4}),
    "TP2 x PP2": Layout(4, {"tensor": 2, "pipeline": 2}),
    "TP2 + SP x PP2": Layout(4, {**SEQUENCE, "pipeline": 2}),
    "TP2 + SP x VPP2": Layout(4, {**SEQUENCE, "pipeline": 2}, VIRTUAL),
    "TP2 + SP x CP2": Layout(4, {**SEQUENCE, "context": 2}),
    "DP2 x TP2": Layout(4, {"tensor": 2}),
    "DP2 x TP2 + SP, overlapped": Layout(4, {**SEQUENCE, **OVERLAP}),
    "DP2 x VPP2, overlapped": Layout(4, {"pipeline": 2, **OVERLAP}, VIRTUAL),
    "DP2 x CP2": Layout(4, {"context": 2}),
    "CP2 x PP2": Layout(4, {"context": 2, "pipeline": 2}),
    "EP2 x TP2 + SP": Layout(4, {**SEQUENCE, "expert": 2}),
    "EP2 x PP2": Layout(4, {"expert": 2, "pipeline": 2}),
    "EP2 x CP2": Layout(4, {"expert": 2, "context": 2}),
    "EP4, overlapped": Layout(4, {"expert": 4, **OVERLAP}),
}


@dataclass(frozen=True)
class Apart:
    """The farthest that the losses (nats) and the gradient norms of two runs are apart."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Row:
    """A layout of a model beside one process; `rounding` is the farthest of the runs with moved weights."""

    model: str
    layout: str
    apart: Apart
    rounding: Apart

    @property
    def holds(self) -> bool:
        """Whether the layout trains the same."""
        within = self.apart.loss <= MARGIN * self.rounding.loss
        return within and self.apart.grad_norm <= MARGIN * self.rounding.grad_norm


def settings(folder: Path, model: str, name: str = "start") -> Settings:
    """The run of a model on one process, or in the layout of that name."""
    layout = LAYOUTS.get(name, Layout(1))
    sizes = dict(MODELS[model])
    main, *depths = sizes["layer_pattern"].split("/")
    if layout.cut:
        ends = [sum(layout.cut[:count]) for count in range(len(layout.cut) + 1)]
        main = "|".join(main[start:end] for start, end in pairwise(ends))
    return toy.settings(
        folder / model,
        name,
        steps=START if name == "start" else START + STEPS,
        model={**sizes, "layer_pattern": "/".join([main, *depths])},
        parallel=layout.parallel,
        data={"cache": str(folder / "cache")},
        trainer={"micro_batch_size": 1},
        checkpoint={"save_interval": STEPS + START},
    )


def compare(
    folder: Path, cases: dict[str, list[str]], resharded: dict[str, list[str]]
) -> tuple[list[Row], list[tuple[str, str, str]]]:
    """Train every model of `cases` on one process and in its layouts; then load checkpoints into other layouts.

    Of the layouts in `resharded`, and of the single process, each takes up the last checkpoint of each other and saves
    it again. Returns the rows, and (model, from, to) where a bit of a tensor has changed: of a weight or of optimizer
    state.
    """
    starts = [settings(folder, model) for model in cases]
    alone = [settings(folder, model, name) for model in cases for name in ("single", *MOVED)]
    split = [settings(folder, model, name) for model, names in cases.items() for name in names]
    phases = [_training(1, starts, None), _training(1, alone, START)]
    phases += [_training(count, of_size, START) for count, of_size in _by_processes(split)]
    again = [
        (settings(folder, model, name), [other for other in ("single", *names) if other != name])
        for model, names in resharded.items()
        for name in ("single", *names)
    ]
    for count, targets in _by_processes([run for run, _ in again]):
        jobs = [{"run": settings_file.to_dict(run), "sources": sources} for run, sources in again if run in targets]
        phases.append(Phase(count, "tests.parity:reshard", jobs))
    lanes.run(folder, phases, LIMIT)

    rows = []
    for model, names in cases.items():
        single = settings(folder, model, "single")
        moved = [_apart(single, replace(single, name=name)) for name in MOVED]
        rounding = Apart(max(it.loss for it in moved), max(it.grad_norm for it in moved))
        rows += [Row(model, name, _apart(single, replace(single, name=name)), rounding) for name in names]
    changed = [
        (Path(run.folder).parent.name, source, run.name)
        for run, _ in again
        for source in json.loads((Path(run.folder) / run.name / CHANGED).read_text())
    ]
    return rows, changed


def _by_processes(runs: list[Settings]) -> list[tuple[int, list[Settings]]]:
    counts = {run.name: LAYOUTS[run.name].processes if run.name in LAYOUTS else 1 for run in runs}
    return [(count, [run for run in runs if counts[run.name] == count]) for count in sorted(set(counts.values()))]


def _training(processes: int, runs: list[Settings], step: int | None) -> Phase:
    jobs = [{"run": settings_file.to_dict(run), "step": step} for run in runs]
    return Phase(processes, "tests.parity:train", jobs)


def train(run: dict[str, Any], step: int | None) -> None:
    """As one rank: train, from the model's common checkpoint of a step."""
    settings = settings_file.from_dict(run, "job")
    if step is not None and os.environ["RANK"] == "0":
        shutil.copytree(checkpoint(replace(settings, name="start"), step), checkpoint(settings, step))
    toy.run(settings)


def checkpoint(run: Settings, step: int) -> Path:
    """Where a run has its checkpoint of a step."""
    return Path(run.folder) / run.name / f"checkpoints/iter_{step:07}"


def _apart(single: Settings, other: Settings) -> Apart:
    def of(key: str) -> float:
        ours, theirs = toy.metrics(other, key), toy.metrics(single, key)
        assert list(ours) == list(theirs) == list(range(START + 1, START + STEPS + 1))
        return max(abs(ours[step] - theirs[step]) for step in theirs)

    return Apart(of("loss"), of("grad_norm"))


def reshard(run: dict[str, Any], sources: Iterable[str]) -> None:
    """As one rank: take up the last checkpoint of each source and save it; those that come out changed go to a file."""
    from hybrid.costs.pipeline import stage_pattern
    from hybrid.training import checkpoint as checkpoints
    from hybrid.training.distributed import start, stop
    from hybrid.training.saving import Saver
    from hybrid.training.setup import set_up

    settings = settings_file.from_dict(run, "job")
    folder, pattern = Path(settings.folder) / settings.name, stage_pattern(settings)
    virtual = len(pattern.segments) // settings.parallel.pipeline
    world = start(settings.parallel, virtual if virtual > 1 else None, settings.trainer.seed)
    training = set_up(settings, pattern, world.device)
    changed = []
    for source in sources:
        path = checkpoint(replace(settings, name=source), START + STEPS)
        position = checkpoints.load(path, settings, training)
        saver = Saver(folder / "again", settings, None, world)
        again = saver.save(training, position, wait=True)[-1].path
        if world.is_main:
            before, after = tensors(path), tensors(again)
            if before.keys() != after.keys() or any(not before[key].equal(after[key]) for key in before):
                changed.append(source)
            shutil.rmtree(again)
        world.barrier()
    if world.is_main:
        (folder / CHANGED).write_text(json.dumps(changed))
    stop()


def tensors(path: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, whole."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    described = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return tensors
