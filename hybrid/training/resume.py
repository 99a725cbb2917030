"""Finding the checkpoint a run goes on from, and refusing one that cannot fit, before anything is built."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from hybrid import settings_file
from hybrid.config import ModelConfig, Settings
from hybrid.data.datasets import on_first_rank
from hybrid.errors import ConfigError, Problem
from hybrid.training import checksums, folder, provenance
from hybrid.training.distributed import World

# What the weights of a model depend on; the derived size where a field may be None.
_SHAPES = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_size",
    "activation": "activation",
    "normalization": "normalization",
    "add_linear_bias": "add_linear_bias",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "query_groups",
    "attention_head_dim": "head_dim",
    "position_embedding": "position_embedding",
    "mamba_version": "mamba_version",
    "mamba_state_dim": "mamba_state_dim",
    "mamba_conv_kernel": "mamba_conv_kernel",
    "vocab_size": "padded_vocab_size",
    "tie_embeddings": "tie_embeddings",
}
_MAMBA1 = {"mamba_expand": "mamba_expand", "mamba_dt_rank": "dt_rank"}
_MAMBA2 = {
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_heads": "mamba_heads",
    "mamba_num_groups": "mamba_num_groups",
}
_EXPERTS = {
    "num_experts": "num_experts",
    "moe_ffn_hidden_size": "moe_ffn_size",
    "moe_shared_expert_size": "moe_shared_expert_size",
    "moe_expert_bias": "moe_expert_bias",
}


def newest_whole(checkpoints: Path, world: World, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are as they were written; None if there is none at all.

    Says of each damaged one that it is passed over. Raises ConfigError if all are, or one is of a newer version.
    """
    steps = on_first_rank(lambda: folder.checkpoint_steps(checkpoints))
    problems = []
    for step in reversed(steps):
        path = folder.checkpoint_folder(checkpoints, step)
        on_first_rank(lambda path=path: refuse_newer(path))
        damage = next(filter(None, world.texts(checksums.damage(path, world.rank, world.size))), "")
        if not damage:
            return path
        problems.append(Problem(str(path), f"this checkpoint is damaged ({damage})"))
        tell(f"warning: {problems[-1]}; the one before it is taken")
    if problems:
        way_out = f"no checkpoint before it is whole; remove '{checkpoints}' to begin anew"
        raise ConfigError([*problems, Problem(str(checkpoints), way_out)])
    return None


def refuse_newer(path: Path) -> None:
    """Raise ConfigError if a checkpoint was written by a version that this one does not know how to read."""
    try:
        versions = json.loads((path / provenance.VERSIONS_FILE).read_text())
    except (OSError, ValueError):
        return  # before there were any, or damaged, which the checksums tell
    if versions.get("format", 1) > provenance.FORMAT:
        writer = versions.get("hybrid-recipes", "a newer version")
        message = f"was written by hybrid-recipes {writer}, in a newer form than this version reads; update it"
        raise ConfigError(Problem(str(path), message))


def refuse_other_model(path: Path, settings: Settings) -> None:
    """Raise ConfigError with each field in which a checkpoint's model differs from the one that is to take it."""
    problems = list(differing_fields(settings_file.read(path).model, settings.model, str(path)))
    if problems:
        raise ConfigError(problems)


def differing_fields(saved: ModelConfig, model: ModelConfig, path: str) -> Iterator[Problem]:
    """The fields whose weights would not fit, as problems."""
    there, here = str(saved.pattern).replace("|", ""), str(model.pattern).replace("|", "")
    if there != here:
        yield Problem("model.layer_pattern", f"is '{here}', but the checkpoint '{path}' has '{there}'")
    shapes = dict(_SHAPES)
    if "M" in here:
        shapes |= _MAMBA1 if model.mamba_version == 1 else _MAMBA2
    if "E" in here:
        shapes |= _EXPERTS
    for name, derived in shapes.items():
        old, new = getattr(saved, derived), getattr(model, derived)
        if old != new:
            yield Problem(f"model.{name}", f"is {new!r}, but the checkpoint '{path}' has {old!r}")
