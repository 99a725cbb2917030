"""Tests that need a CUDA device and the packages with its kernels: `pytest -m gpu`."""

import os
from collections.abc import Iterator

import pytest

# Triton's products of float32 numbers in float32, not in TF32, so that they can be compared with the reference. The
# kernels are compiled at their first use, after this.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


@pytest.fixture(autouse=True)
def gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture
def alone() -> Iterator[None]:
    """One process with Megatron's parallel state."""
    import hybrid.quiet  # noqa: F401
    from hybrid.config import ParallelConfig
    from hybrid.training.distributed import start, stop

    start(ParallelConfig(), None, 3)
    yield
    stop()
