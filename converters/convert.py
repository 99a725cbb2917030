"""Opening, inspecting, comparing and converting checkpoints of any format.

from converters import convert
convert.open_checkpoint("runs/a").model            # what it is; no weights are read
for name, tensor in convert.stream("hf:/data/m"):  # canonical name, torch.Tensor; one at a time
    ...
convert.convert("old/", "new/", to="hf")
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from converters import hf, layout, megatron, naming, output, torch_dist
from converters.checkpoint import Checkpoint, Optimizer
from converters.output import Progress, Report
from converters.streams import Reader
from converters.tensors import FLOATS, Tensor, cast, cat, narrow, zeros
from converters.torchfile import Files, reading
from hybrid.errors import CheckpointError, ConfigError, Problem, UserError
from hybrid.training import folder as run_folder

if TYPE_CHECKING:
    import torch

FORMATS: dict[str, ModuleType] = {"torch_dist": torch_dist, "megatron": megatron, "hf": hf}

# Of two number formats the one with the larger number holds larger values.
_REACH = {"float64": 3, "float32": 2, "bfloat16": 2, "float16": 1}
_BFLOAT16_END = 3.38e38


@dataclass(frozen=True)
class Result:
    """What a conversion wrote."""

    path: Path
    format: str
    files: int
    nbytes: int
    progress: Progress | None
    verified: bool = False

    def __str__(self) -> str:
        read_back = "; read back, and the same" if self.verified else ""
        return f"{self.path}: {self.format}, {self.files} files, {self.progress}{read_back}"


def open_checkpoint(
    reference: str | Path, overrides: Mapping[str, Any] | None = None, allow: Iterable[str] = ()
) -> Checkpoint:
    """Open a checkpoint: a folder or file of any format, a run's folder or name, or FORMAT:PATH.

    The format is found by looking. `overrides` are fields of ModelConfig that win over what the checkpoint says;
    `allow` are names that pickles may hold beyond those known. Reads headers only. Raises ConfigError if there is
    nothing or nothing known there, CheckpointError or ConfigError for what is damaged or contradictory.
    """
    known = dict(overrides or {})
    stated, path = _reference(reference)
    with reading(path):
        for name, module in FORMATS.items():
            if stated in (None, name) and module.find(path) is not None:
                return module.read(path, known, list(allow))
    if stated is None and (not path.exists() or (path / run_folder.CHECKPOINTS).is_dir()):
        return _of_run(run_folder.find_checkpoint(str(reference)), known, list(allow))
    raise ConfigError(Problem(str(reference), _nothing(path, stated)))


def _of_run(folder: Path, known: Mapping[str, Any], allow: list[str]) -> Checkpoint:
    """A run's newest checkpoint. Where it is damaged, the error names the one before."""
    try:
        with reading(folder):
            return torch_dist.read(folder, known, allow)
    except CheckpointError as error:
        steps = run_folder.checkpoint_steps(folder.parent)
        if len(steps) < 2:
            raise
        before = run_folder.checkpoint_folder(folder.parent, steps[-2])
        raise CheckpointError(f"{error}; the run's checkpoint before it is {before}") from error


def stream(
    source: str | Path | Checkpoint, overrides: Mapping[str, Any] | None = None, allow: Iterable[str] = ()
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """The logical tensors of a checkpoint as (canonical name, tensor), one in memory at a time."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, overrides, allow)
    with Reader() as reader:
        for name, tensor in checkpoint.tensors.items():
            yield name, reader.tensor(tensor)


def rank_state(
    source: str | Path | Checkpoint,
    tensor: tuple[int, int] = (0, 1),
    pipeline: tuple[int, int] = (0, 1),
    expert: tuple[int, int] = (0, 1),
    layer_pattern: str | None = None,
    fused_norms: bool = True,
) -> list[dict[str, "torch.Tensor"]]:
    """What one rank's model loads with `load_state_dict`: per virtual stage, name of the live parameter -> tensor.

    `tensor`, `pipeline` and `expert` are (rank, size). Only this rank's part is read. `layer_pattern` says where the
    stages end; `fused_norms` as in `megatron.plan`. Raises CheckpointError for missing or unknown tensors, ConfigError
    for weights with which our model computes otherwise.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    checkpoint.require_complete()
    checkpoint.require_expressed()
    sizes = {"tensor": tensor[1], "pipeline": pipeline[1], "expert": expert[1]}
    target = layout.target(checkpoint.model, **sizes, cut=layer_pattern)
    shards = layout.shards(checkpoint.tensors, checkpoint.model, target)
    with Reader() as reader:
        return [
            {
                megatron.live_name(name, checkpoint.model, fused_norms): reader.tensor(part)
                for name, part in megatron.live_order(shards[tensor[0], segment, expert[0]], fused_norms).items()
            }
            for segment in target.segments(pipeline[0])
        ]


def as_torch_dist(
    reference: str | Path | Checkpoint,
    cache: str | Path,
    overrides: Mapping[str, Any] | None = None,
    report: Report | None = None,
    vocabulary: tuple[int, int] | None = None,
) -> Path:
    """The folder from which training and generation load a checkpoint of any format.

    A distributed checkpoint is its own; another is converted once into a folder under `cache`, which is named after the
    files it came from. `vocabulary` is a (size, multiple) that the embedding must be padded to; by default it is as in
    `convert`. Not to be called by several processes for one checkpoint at a time. Raises as `convert` does, and
    ConfigError for weights with which our model computes otherwise (`Checkpoint.require_expressed`).
    """
    checkpoint = reference if isinstance(reference, Checkpoint) else open_checkpoint(reference, overrides)
    checkpoint.require_expressed()
    rows = -(-vocabulary[0] // vocabulary[1]) * vocabulary[1] if vocabulary else checkpoint.model.padded_vocab_size
    if checkpoint.format == "torch_dist" and rows == checkpoint.model.padded_vocab_size:
        return checkpoint.path
    destination = torch_dist_folder(checkpoint, cache, vocabulary)
    if torch_dist.find(destination) is None:
        if vocabulary:
            said = {**checkpoint.args, "make_vocab_size_divisible_by": vocabulary[1]}
            checkpoint = replace(with_rows(checkpoint, *vocabulary), args=said, settings=None)
        # Training and generation run without the MTP layers that are not read; whoever converts a model is asked first.
        convert(replace(checkpoint, unread_mtp=False), destination, "torch_dist", report=report)
    found = torch_dist.find(destination)
    assert found is not None
    return found


def torch_dist_folder(checkpoint: Checkpoint, cache: str | Path, vocabulary: tuple[int, int] | None = None) -> Path:
    """Where `as_torch_dist` converts a checkpoint to; other files, settings or rows give another folder."""
    files = {file for tensor in checkpoint.tensors.values() for file in tensor.files} | set(checkpoint.companions)
    stated = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    whole = (stated, checkpoint.model, checkpoint.hf_config, vocabulary)
    mark = hashlib.sha256(repr(whole).encode()).hexdigest()[:12]
    return Path(cache) / f"{checkpoint.path.resolve().name}-{mark}"


def convert(
    source: str | Path | Checkpoint,
    destination: str | Path,
    to: str,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    layer_pattern: str | None = None,
    family: str | None = None,
    dtype: str | None = None,
    drop_mtp: bool = False,
    fused_norms: bool = True,
    optimizer: bool = False,
    overrides: Mapping[str, Any] | None = None,
    allow: Iterable[str] = (),
    verify: bool = False,
    report: Report | None = None,
) -> Result:
    """Write a checkpoint in another format or layout. The destination must not exist; it appears whole or not at all.

    `to` is a key of FORMATS. `tensor`, `pipeline` and `expert` are parallel sizes; `layer_pattern` is the model's own
    with '|' where pipeline stages are to end (default: stages of about equal size). `family` is one of
    `hf_families.FAMILIES`. `dtype` is a number format for all but parameters that need float32 (`naming.FLOAT32`).
    `fused_norms` as in `megatron.plan`. `optimizer` carries the optimizer's state over, where both formats have one.
    `verify` reads everything back. Raises CheckpointError and ConfigError as `open_checkpoint`, ConfigError for a
    target that the model cannot take and for an existing destination, UserError for a disk without room.
    """
    path = Path(destination)
    output.refuse_existing(path)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, overrides, allow)
    _refuse_into_source(checkpoint, path)
    with reading(checkpoint.path):
        files = planned(
            checkpoint,
            to,
            tensor=tensor,
            pipeline=pipeline,
            expert=expert,
            layer_pattern=layer_pattern,
            family=family,
            dtype=dtype,
            drop_mtp=drop_mtp,
            fused_norms=fused_norms,
            optimizer=optimizer,
        )
    if dtype is not None:
        _refuse_overflow(_without_mtp(checkpoint) if drop_mtp else checkpoint, dtype)
    total = output.total_bytes(files)
    last: list[Progress] = []

    def keep(progress: Progress) -> None:
        last[:] = [progress]
        if report:
            report(progress)

    with output.replacing(path, total) as part:
        output.write(part, files, keep)
        if verify and (different := output.differences(part, files)):
            raise UserError(f"{', '.join(different)} read back differently than written; {path} was not kept")
    return Result(path, to, len(files), total, last[0] if last else None, verify)


def planned(
    checkpoint: Checkpoint,
    to: str,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    layer_pattern: str | None = None,
    family: str | None = None,
    dtype: str | None = None,
    drop_mtp: bool = False,
    fused_norms: bool = True,
    optimizer: bool = False,
) -> Files:
    """The files that `convert` writes, planned; nothing is read or written but headers."""
    if to not in FORMATS:
        raise ConfigError(Problem("--to", f"is '{to}', which is not one of {', '.join(FORMATS)}"))
    _refuse_foreign_options(to, (tensor, pipeline, expert) != (1, 1, 1), layer_pattern, family, fused_norms)
    checkpoint.require_complete()
    if checkpoint.unread_mtp and not drop_mtp:
        raise ConfigError(
            Problem(
                str(checkpoint.path),
                f"has {', '.join(checkpoint.left_out)}, which is not read from hf",
                "leave the MTP layers out with --drop-mtp",
            )
        )
    state = _optimizer(checkpoint, to) if optimizer else None
    if drop_mtp:
        checkpoint = _without_mtp(checkpoint)
    if state is not None and dtype == "float32":
        # They are the weights themselves then, which have no copy in float32 beside them.
        originals = {name: t for name, t in state.slots["fp32_param"].items() if name in checkpoint.tensors}
        checkpoint = replace(checkpoint, tensors=checkpoint.tensors | originals)
    checkpoint = _with_dtype(checkpoint, dtype)
    if to == "hf" and checkpoint.unexpressed:
        raise ConfigError(
            Problem(str(checkpoint.path), f"has {', '.join(checkpoint.unexpressed)}, which no family of hf has")
        )
    if to == "hf":
        return hf.plan(with_rows(checkpoint, checkpoint.model.vocab_size, 1), family)
    checkpoint = _padded(checkpoint, to, tensor)
    if state is not None:
        rows = checkpoint.model.padded_vocab_size
        kept = {
            slot: {name: t for name, t in of.items() if name in checkpoint.tensors} for slot, of in state.slots.items()
        }
        state = replace(state, slots={slot: _with_vocabulary(of, rows) for slot, of in kept.items()})
    target = layout.target(checkpoint.model, tensor, pipeline, expert, layer_pattern)
    if to == "torch_dist":
        return torch_dist.plan(checkpoint, target, state)
    return megatron.plan(checkpoint, target, fused_norms, state)


def _refuse_foreign_options(
    to: str, parallel: bool, layer_pattern: str | None, family: str | None, fused_norms: bool
) -> None:
    """Raise ConfigError for every option that the target has no use for, so that none is passed over in silence."""
    problems: list[Problem] = []
    if to == "hf" and parallel:
        problems.append(Problem("--to", "hf has no parallel layout; leave the parallel sizes out"))
    if to == "hf" and layer_pattern is not None:
        problems.append(Problem("--layer-pattern", "says where pipeline stages end, and hf has none; leave it out"))
    if to != "hf" and family is not None:
        problems.append(Problem("--family", f"is one of Hugging Face's; leave it out, or write --to hf and not {to}"))
    if to != "megatron" and not fused_norms:
        problems.append(
            Problem("--separate-norms", f"gives names of --to megatron, and {to} has its own; leave it out")
        )
    if problems:
        raise ConfigError(problems)


def with_rows(checkpoint: Checkpoint, vocab_size: int, multiple: int) -> Checkpoint:
    """The checkpoint with its vocabulary cut or padded with zeros to a multiple of `multiple` rows."""
    model = replace(checkpoint.model, vocab_size=vocab_size, vocab_size_multiple=multiple)
    return replace(checkpoint, model=model, tensors=_with_vocabulary(checkpoint.tensors, model.padded_vocab_size))


def _padded(checkpoint: Checkpoint, to: str, tensor: int) -> Checkpoint:
    """With the rows that the target needs: for a legacy layout Megatron's rule, which depends on the tensor parallel
    size; elsewhere as many as there are, unless the ranks cannot share them."""
    model = checkpoint.model
    divisor = checkpoint.args.get("make_vocab_size_divisible_by")
    if checkpoint.settings is not None or not isinstance(divisor, int):
        # A checkpoint of ours, or of Hugging Face, whose rows say how they were padded; Megatron's own rule is 128.
        divisor = model.vocab_size_multiple if checkpoint.settings else min(128, model.vocab_size_multiple)
    if to == "megatron":
        return with_rows(checkpoint, model.vocab_size, divisor * tensor)
    padded = with_rows(checkpoint, model.vocab_size, divisor)
    fits = padded.model.padded_vocab_size % tensor == 0
    return padded if fits else with_rows(padded, model.vocab_size, divisor * tensor)


def _with_vocabulary(tensors: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    both = (naming.EMBEDDING, naming.OUTPUT)
    return {name: _resized(tensor, rows) if name in both else tensor for name, tensor in tensors.items()}


def _optimizer(checkpoint: Checkpoint, to: str) -> Optimizer:
    if to == "hf":
        raise ConfigError(Problem("--optimizer", "hf has no place for the optimizer's state; leave it out"))
    if checkpoint.optimizer is None:
        raise ConfigError(Problem("--optimizer", f"{checkpoint.path} has no optimizer state"))
    state = checkpoint.optimizer()
    weights = {name for name in checkpoint.tensors if not name.endswith("mlp.router.expert_bias")}
    for slot, tensors in state.slots.items():
        if missing := sorted(weights - tensors.keys()):
            raise CheckpointError(f"{checkpoint.path}: the optimizer state lacks {slot} of {missing[0]}")
    return state


def _resized(tensor: Tensor, rows: int) -> Tensor:
    have = tensor.shape[0]
    if rows <= have:
        return narrow(tensor, 0, 0, rows)
    return cat([tensor, zeros((rows - have, *tensor.shape[1:]), tensor.dtype)], 0)


def _with_dtype(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    if dtype is None:
        return checkpoint
    if dtype not in FLOATS:
        raise ConfigError(Problem("--dtype", f"is '{dtype}', which is not one of {', '.join(FLOATS)}"))
    changed = {
        name: tensor if _stays(name, tensor, dtype) else cast(tensor, dtype)
        for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=changed)


def _stays(name: str, tensor: Tensor, dtype: str) -> bool:
    """Whether a tensor keeps its number format where another one is asked for."""
    small = dtype in ("bfloat16", "float16")
    return tensor.dtype not in FLOATS or bool(tensor.dtype == "float32" and small and naming.FLOAT32.search(name))


def _refuse_overflow(checkpoint: Checkpoint, dtype: str) -> None:
    """Raise ConfigError if a value would become infinite; only formats that reach further are read."""
    import torch

    with Reader() as reader:
        for name, tensor in checkpoint.tensors.items():
            if _stays(name, tensor, dtype) or _REACH[tensor.dtype] <= _REACH[dtype]:
                continue
            largest = reader.largest(tensor)
            if torch.tensor(largest, dtype=torch.float64).to(getattr(torch, dtype)).isinf():
                way_out = "write bfloat16" if dtype == "float16" and largest < _BFLOAT16_END else "leave it out"
                said = f"is {dtype}, in which {name} would become infinite: it has values of up to {largest:.5g}"
                raise ConfigError(Problem("--dtype", f"{said}; {way_out}"))


def _without_mtp(checkpoint: Checkpoint) -> Checkpoint:
    model = replace(checkpoint.model, layer_pattern=str(checkpoint.model.pattern).split("/")[0])
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith("mtp.")}
    return replace(checkpoint, model=model, tensors=tensors)


def _reference(reference: str | Path) -> tuple[str | None, Path]:
    """The format that FORMAT:PATH states, if it does, and the path."""
    text = str(reference)
    name, colon, rest = text.partition(":")
    if colon and name in FORMATS and rest:
        return name, Path(rest)
    return None, Path(text)


def _nothing(path: Path, stated: str | None) -> str:
    if not path.exists():
        return "does not exist"
    if stated:
        return f"is no checkpoint of the format {stated}"
    names = sorted(entry.name for entry in path.iterdir())[:5] if path.is_dir() else [path.name]
    inside = f"it holds {', '.join(names)}" if names else "it is empty"
    return (
        "is no checkpoint: neither mp_rank folders (megatron), nor .metadata (torch_dist), nor config.json with "
        f"weights (hf); {inside}"
    )


def _refuse_into_source(checkpoint: Checkpoint, destination: Path) -> None:
    source, target = checkpoint.path.resolve(), destination.resolve()
    if (source.parent / megatron.TRACKER).is_file():
        source = source.parent
    if source.name == run_folder.CHECKPOINTS and (source.parent / run_folder.SETTINGS_FILE).is_file():
        source = source.parent  # the run, which goes on in its folder
    if target == source or source in target.parents:
        raise ConfigError(Problem(str(destination), f"lies in the source {source}, into which nothing is written"))
