"""A checkpoint that has been opened: what is known of it, and its tensors, which are still in its files."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters import architecture, naming
from converters.layout import Layout
from converters.tensors import Tensor
from converters.torchfile import Files, bytes_plan
from hybrid import pattern
from hybrid.config import ModelConfig, Settings
from hybrid.errors import CheckpointError, ConfigError, Problem, nearest

COMPANIONS = re.compile(
    r"(hybrid_)?tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template.*|"
    r"generation_config\.json|.*\.model|.*\.tiktoken"
)
"""Files beside the weights that go along: the tokenizer's and the settings of generation."""

HF_CONFIG = "hf_config.json"
"""Where Megatron's formats keep the config.json that a model came with: nothing of it is lost on the way back."""

SLOTS = ("fp32_param", "exp_avg", "exp_avg_sq")
"""What an Adam optimizer keeps for every parameter: the float32 original, first and second moment."""


def companions_of(folder: Path) -> list[Path]:
    """The files that go along with the weights in a folder: beside them, and in the folder of a run's tokenizer."""
    places = (folder, folder / "tokenizer")
    files = (path for place in places if place.is_dir() for path in place.iterdir() if path.is_file())
    return sorted(path for path in files if COMPANIONS.fullmatch(path.name))


def hf_config_of(folder: Path) -> dict[str, Any]:
    """The config.json that a model in Megatron's format came with, or nothing."""
    try:
        content = json.loads((folder / HF_CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def companion_files(checkpoint: "Checkpoint", prefix: str = "") -> Files:
    """The plans of what goes along with a checkpoint in a format that is not Hugging Face's."""
    files = {f"{prefix}{path.name}": bytes_plan(path.read_bytes()) for path in checkpoint.companions}
    if checkpoint.hf_config:
        files[f"{prefix}{HF_CONFIG}"] = bytes_plan((json.dumps(checkpoint.hf_config, indent=2) + "\n").encode())
    return files


@dataclass
class Optimizer:
    """Optimizer state: for every slot, the logical tensors by canonical name.

    `groups` are the settings of the parameter groups with the step count; `scheduler` is the schedule's state.
    `distributed`: it was Megatron's distributed optimizer. `step_per_parameter`: the step count lay beside every
    parameter and not in its group.
    """

    slots: dict[str, dict[str, Tensor]]
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] | None = None
    distributed: bool = False
    step_per_parameter: bool = False


@dataclass
class Checkpoint:
    """What is in a folder, in any format.

    `tensors` are logical tensors by canonical name (`converters.naming`). `layout` is None where the format has none.
    `args` are Megatron's arguments as they were stored, `unexpressed` says what of them `model` cannot. `left_out` says
    what is there but is not read: what is no weight, and multi-token prediction of Hugging Face's (`unread_mtp`).
    """

    path: Path
    format: str
    model: ModelConfig
    tensors: dict[str, Tensor]
    layout: Layout | None = None
    iteration: int | None = None
    samples: int | None = None
    args: dict[str, Any] = field(default_factory=dict)
    settings: Settings | None = None
    family: str | None = None
    hf_config: dict[str, Any] = field(default_factory=dict)
    companions: list[Path] = field(default_factory=list)
    unexpressed: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    unread_mtp: bool = False
    optimizer: Callable[[], Optimizer] | None = None

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder of the tokenizer's files among the companions; None if there are none."""
        files = (path for path in self.companions if "tokenizer" in path.name or path.suffix == ".model")
        return next((path.parent for path in files), None)

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes by number format."""
        result: dict[str, int] = {}
        for tensor in self.tensors.values():
            result[tensor.dtype] = result.get(tensor.dtype, 0) + tensor.nbytes
        return result

    def require_complete(self) -> None:
        """Raise CheckpointError if a tensor is missing or one is unknown."""
        problems = [f"{name} is missing" for name in self.missing]
        problems += [f"{name} is unknown{hint}" for name, hint in self.unknown.items()]
        if problems:
            shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
            raise CheckpointError(
                f"{self.path} cannot be converted as it stands:\n" + "\n".join(f"  {p}" for p in shown)
            )

    def require_expressed(self) -> None:
        """Raise ConfigError if our model computes otherwise with these weights than the one they are of."""
        if self.unexpressed:
            raise ConfigError(
                Problem(
                    str(self.path),
                    f"has {', '.join(self.unexpressed)}, which our model does not compute; these weights can be "
                    "converted to megatron and torch_dist, for Megatron itself, but neither run nor trained here",
                )
            )


def in_order(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The tensors in the order of the model; those it does not know at the end."""
    known = {name: tensors[name] for name in naming.parameters(model) if name in tensors}
    return known | {name: tensor for name, tensor in tensors.items() if name not in known}


def complete(
    tensors: Mapping[str, Tensor], symbols: Mapping[str, str], known: Mapping[str, Any]
) -> tuple[ModelConfig, list[str], list[str], dict[str, str]]:
    """Return what a set of tensors is: (architecture, what of it is assumed, missing names, unknown names with a hint).

    `symbols` are the layers of each stack (`aliases.canonical`); in `known` are ModelConfig fields from elsewhere.
    Raises ConfigError where they contradict one another.
    """
    depths = sorted((stack, kinds) for stack, kinds in symbols.items() if stack.startswith("mtp."))
    text = "/".join([symbols.get("decoder", ""), *(kinds for _, kinds in depths)])
    stated = known.get("layer_pattern")
    if stated and _layers(stated) != _layers(text):
        raise ConfigError(
            Problem("model.layer_pattern", f"is said to be '{_layers(stated)}', but the tensors are of '{text}'")
        )
    pattern.parse(text)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    model, assumed = architecture.infer(shapes, text, known)
    missing, unknown, problems = architecture.check(shapes, model)
    if problems:
        raise ConfigError(problems)
    expected = naming.parameters(model)
    return model, assumed, missing, {name: nearest(name, expected) for name in unknown}


def _layers(text: str) -> str:
    return text.replace("|", "")
