"""Parts that recipes share; those in `BY_SECTION` can be given to a section by name, as in `data=mock`.

A parameter without a default takes, where a part is given by name, the value that the section it replaces has.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hybrid.config import CheckpointConfig, DataConfig, ParallelConfig
from recipes.nodes import config

if TYPE_CHECKING:
    import fiddle as fdl


def stdlib(sequence_length: int) -> "fdl.Config[DataConfig]":
    """The running Python's own standard library, as bytes: text that is there without a download."""
    return config(DataConfig, source="stdlib", tokenizer="byte", sequence_length=sequence_length)


def mock(sequence_length: int) -> "fdl.Config[DataConfig]":
    """Made-up tokens, for measuring speed and trying out a layout."""
    return config(DataConfig, source="mock", tokenizer="byte", sequence_length=sequence_length)


def indexed(sequence_length: int, tokenizer: str) -> "fdl.Config[DataConfig]":
    """Megatron's .bin/.idx files, made by `hybrid data prepare`; the user says which with data.path."""
    return config(DataConfig, source="indexed", tokenizer=tokenizer, sequence_length=sequence_length)


def single() -> "fdl.Config[ParallelConfig]":
    """The model whole on every process; data parallel over all of them."""
    return config(ParallelConfig, tensor=1, pipeline=1, context=1)


def tensor_parallel(tensor: int) -> "fdl.Config[ParallelConfig]":
    """The model split over `tensor` GPUs of one machine, with everything that hides the communication."""
    return config(
        ParallelConfig,
        tensor=tensor,
        sequence=tensor > 1,
        distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )


def checkpoints_every(steps: int) -> "fdl.Config[CheckpointConfig]":
    """A checkpoint every so many steps."""
    return config(CheckpointConfig, save_interval=steps)


BY_SECTION: dict[str, dict[str, Callable[..., Any]]] = {
    "data": {"stdlib": stdlib, "mock": mock},
    "parallel": {"single": single, "tensor_parallel": tensor_parallel},
}
