"""What a checkpoint is, in words and as JSON, and how two differ."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters import naming
from converters.checkpoint import Checkpoint
from converters.streams import Reader, boxes, converted
from converters.tensors import FLOATS, Tensor, narrow

_NAMES = {"megatron": "Megatron legacy", "torch_dist": "Megatron distributed (torch_dist)", "hf": "Hugging Face"}


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything `inspect` says, as plain data."""
    model = checkpoint.model
    layout = checkpoint.layout
    files = sorted(_files(checkpoint))
    tensors = checkpoint.tensors.values()
    embedding = sum(t.size for name, t in checkpoint.tensors.items() if name in (naming.EMBEDDING, naming.OUTPUT))
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "family": checkpoint.family,
        "iteration": checkpoint.iteration,
        "samples": checkpoint.samples,
        "layer_pattern": str(layout.pattern if layout else model.pattern),
        "model": asdict(model),
        "layout": None
        if layout is None
        else {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "virtual": layout.virtual,
            "expert": layout.expert,
        },
        "parameters": sum(tensor.size for tensor in tensors),
        "non_embedding_parameters": sum(tensor.size for tensor in tensors) - embedding,
        "tensors": len(checkpoint.tensors),
        "bytes_by_dtype": checkpoint.dtypes,
        "files": len(files),
        "file_bytes": sum(file.stat().st_size for file in files),
        "optimizer": checkpoint.optimizer is not None,
        "unexpressed": checkpoint.unexpressed,
        "assumed": checkpoint.assumed,
        "missing": checkpoint.missing,
        "unknown": list(checkpoint.unknown),
        "left_out": checkpoint.left_out,
        "companions": [path.name for path in checkpoint.companions],
    }


def text(checkpoint: Checkpoint) -> str:
    """What `inspect` prints."""
    known, model = facts(checkpoint), checkpoint.model
    family = f", {checkpoint.family}" if checkpoint.family else ""
    lines = [("format", f"{_NAMES[checkpoint.format]}{family}"), ("path", known["path"])]
    if checkpoint.iteration is not None:
        samples = f", {checkpoint.samples:,} samples" if checkpoint.samples else ""
        lines.append(("iteration", f"{checkpoint.iteration:,}{samples}"))
    lines.append(("layer pattern", f"{known['layer_pattern']}  ({_layers(checkpoint)})"))
    lines.append(("model", _model(checkpoint)))
    lines.append(("parameters", f"{known['parameters']:,} ({known['non_embedding_parameters']:,} without embeddings)"))
    lines.append(("layout", str(checkpoint.layout) if checkpoint.layout else "none: fits any"))
    dtypes = ", ".join(f"{dtype} {_size(count)}" for dtype, count in known["bytes_by_dtype"].items())
    lines.append(("weights", f"{known['tensors']} tensors: {dtypes}"))
    lines.append(("files", f"{known['files']}, {_size(known['file_bytes'])}"))
    lines.append(("optimizer", "its state is there" if known["optimizer"] else "no state"))
    if known["companions"]:
        lines.append(("beside it", ", ".join(known["companions"])))
    if model.tie_embeddings:
        lines.append(("embeddings", "tied: the output layer uses the embedding"))
    for name, title in (
        ("unexpressed", "beyond config"),
        ("assumed", "assumed"),
        ("missing", "missing"),
        ("left_out", "left out"),
    ):
        if known[name]:
            lines.append((title, _some(known[name])))
    if checkpoint.unknown:
        lines.append(("unknown", _some([f"{name}{hint}" for name, hint in checkpoint.unknown.items()])))
    width = max(len(title) for title, _ in lines)
    return "\n".join(f"{title:<{width}}  {value}" for title, value in lines)


def tensor_lines(checkpoint: Checkpoint) -> Iterator[str]:
    """One line a tensor: canonical name, shape, number format, bytes."""
    width = max(map(len, checkpoint.tensors), default=0)
    for name, tensor in checkpoint.tensors.items():
        yield f"{name:<{width}}  {list(tensor.shape)!s:<22} {tensor.dtype:<9} {_size(tensor.nbytes)}"


def recipe(checkpoint: Checkpoint) -> str:
    """A recipe in YAML of this model and layout, which `hybrid show` and `plan` take as @file.yaml."""
    import yaml

    layout = checkpoint.layout
    model = {name: value for name, value in asdict(checkpoint.model).items() if value is not None}
    model["layer_pattern"] = str(layout.pattern if layout else checkpoint.model.pattern)
    document: dict[str, Any] = {"version": 1, "task": "pretrain", "name": _name(checkpoint.path), "model": model}
    if layout:
        sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline, "expert": layout.expert}
        document["parallel"] = sizes | {"sequence": layout.tensor > 1}
    return yaml.safe_dump(document, sort_keys=False)


@dataclass(frozen=True)
class Difference:
    """How one tensor, or one field of the architecture, differs: what it is in the first and in the second."""

    name: str
    first: str
    second: str
    largest: float | None = None

    def __str__(self) -> str:
        if self.largest is not None:
            return f"{self.name}: values differ by up to {self.largest:.3g} (largest magnitude {self.first})"
        return f"{self.name}: {self.first} / {self.second}"


def diff(first: Checkpoint, second: Checkpoint, values: bool = True) -> Iterator[Difference]:
    """What differs between two checkpoints of any formats: architecture, names, shapes, number formats, values.

    Of a vocabulary padded to different lengths, the rows of its tokens are compared: what pads it means nothing.
    Values of different number formats are compared in float32.
    """
    before, after = asdict(first.model), asdict(second.model)
    for name, value in before.items():
        if after[name] != value and name not in ("vocab_size_multiple", "layer_pattern"):
            yield Difference(f"model.{name}", str(value), str(after[name]))
    if first.model.pattern.layers != second.model.pattern.layers:
        yield Difference("model.layer_pattern", str(first.model.pattern), str(second.model.pattern))
    with Reader() as reader:
        for name in [*first.tensors, *(name for name in second.tensors if name not in first.tensors)]:
            a, b = first.tensors.get(name), second.tensors.get(name)
            if a is None or b is None:
                yield Difference(name, "there" if a else "missing", "there" if b else "missing")
                continue
            if a.shape != b.shape:
                rows = min(first.model.vocab_size, second.model.vocab_size, a.shape[0], b.shape[0])
                if name not in (naming.EMBEDDING, naming.OUTPUT) or a.shape[1:] != b.shape[1:]:
                    yield Difference(name, str(list(a.shape)), str(list(b.shape)))
                    continue
                a, b = narrow(a, 0, 0, rows), narrow(b, 0, 0, rows)
            if a.dtype != b.dtype:
                yield Difference(name, a.dtype, b.dtype)
            if values and (found := _compare(reader, a, b)):
                yield Difference(name, f"{found[1]:.3g}", "", found[0])


def _compare(reader: Reader, a: Tensor, b: Tensor) -> tuple[float, float] | None:
    """The largest difference and the largest magnitude, or None if every value is the same (bit by bit, if the number
    formats are)."""
    largest = magnitude = 0.0
    same = True
    limit = 1 << 21
    for start, shape in boxes(a.shape, limit):
        left, right = reader.box(a, start, shape), reader.box(b, start, shape)
        if a.dtype == b.dtype and np.array_equal(left, right):
            continue
        if a.dtype not in FLOATS or b.dtype not in FLOATS:
            same = False
            largest = max(largest, 1.0)
            continue
        x, y = (converted(w, t.dtype, "float32").view(np.float32) for w, t in ((left, a), (right, b)))
        gap = np.abs(x.astype(np.float64) - y.astype(np.float64))
        if a.dtype != b.dtype and not gap.any():
            continue
        same = False
        largest = max(largest, float(np.nan_to_num(gap, nan=np.inf).max(initial=0.0)))
        magnitude = max(magnitude, float(np.nanmax(np.abs(x), initial=0.0)))
    return None if same else (largest, magnitude)


def _files(checkpoint: Checkpoint) -> set[Path]:
    return {file for tensor in checkpoint.tensors.values() for file in tensor.files}


def _layers(checkpoint: Checkpoint) -> str:
    counts = checkpoint.model.pattern.counts(include_mtp=False)
    words = ", ".join(f"{count} {symbol}" for symbol, count in counts.items() if count)
    return f"{checkpoint.model.pattern.num_layers} layers: {words}"


def _model(checkpoint: Checkpoint) -> str:
    model, layers = checkpoint.model, checkpoint.model.pattern.counts()
    words = [f"hidden size {model.hidden_size}", f"vocabulary {model.vocab_size}"]
    if model.padded_vocab_size != model.vocab_size:
        words[-1] += f" (padded to {model.padded_vocab_size})"
    if layers["M"] and model.mamba_version == 2:
        words.append(
            f"Mamba-2 {model.mamba_heads} heads x {model.mamba_head_dim}, state {model.mamba_state_dim}, "
            f"{model.mamba_num_groups} groups"
        )
    elif layers["M"]:
        words.append(f"Mamba-1 inner {model.mamba_inner_size}, state {model.mamba_state_dim}, rank {model.dt_rank}")
    if layers["*"]:
        words.append(
            f"attention {model.num_attention_heads} heads x {model.head_dim}, {model.query_groups} key-value heads"
        )
        if model.position_embedding != "none":
            words.append(f"positions {model.position_embedding}")
    if layers["+"]:
        words.append(
            f"latent attention {model.num_attention_heads} heads x {model.mla_head_dim} + {model.mla_rope_head_dim} "
            f"rotated, values of {model.mla_value_head_dim}, ranks {model.mla_query_rank} and {model.mla_kv_rank}"
        )
    if layers["-"]:
        words.append(f"MLP {model.ffn_size} {model.activation}")
    if layers["E"]:
        words.append(f"{model.num_experts} experts of {model.moe_ffn_size}, {model.moe_top_k} a token")
    return "; ".join(words)


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def _some(names: list[str], limit: int = 12) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _name(path: Path) -> str:
    parent = path.parent if path.name.startswith("iter_") or path.name == "release" else path
    parent = parent.parent if parent.name == "checkpoints" else parent
    return parent.resolve().name
