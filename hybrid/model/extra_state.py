"""The "extra state" of transformer-engine's modules in checkpoints: the scales of FP8 with delayed scaling.

Without delayed scaling it is empty, and torch modules have none; a checkpoint of either kind is to load into a model of
either. So it is only saved where it means something, and only asked of a checkpoint that has it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

MARK = "_extra_state"
ALLOW = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def to_save(state: dict[str, Any], config: TransformerConfig) -> dict[str, Any]:
    """The sharded state of a model without extra state that says nothing."""
    return state if _delayed(config) else without(state)


def to_go_on(state: dict[str, Any], config: TransformerConfig, path: str) -> dict[str, Any]:
    """The sharded state to ask of the checkpoint at `path`, which the run itself saved."""
    if not _delayed(config):
        return without(state)
    saved = {entry.key for entry in load_sharded_metadata(path).values()}
    return {name: entry for name, entry in state.items() if MARK not in name or entry.key in saved}


def without(state: dict[str, Any]) -> dict[str, Any]:
    """The sharded state to ask of any other checkpoint: scales are found anew in a few steps."""
    return {name: entry for name, entry in state.items() if MARK not in name}


def load(model: nn.Module, state: dict[str, Any], *, own: bool = False) -> None:
    """Load all of a model's state but extra state that was not saved.

    Transformer-engine keeps the scales as a pickle, which can run code when it is read, and reads it only if an
    environment variable says so: it does for a checkpoint of the run's `own`.
    """
    with _allowed() if own else nullcontext():
        wrong = model.load_state_dict(state, strict=False)
    lacking = [name for name in wrong.missing_keys if MARK not in name]
    assert not lacking and not wrong.unexpected_keys, (lacking, wrong.unexpected_keys)


@contextmanager
def _allowed() -> Iterator[None]:
    before = os.environ.get(ALLOW)
    os.environ[ALLOW] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ALLOW]
        else:
            os.environ[ALLOW] = before


def _delayed(config: TransformerConfig) -> bool:
    return bool(config.fp8) and config.fp8_recipe == "delayed"
