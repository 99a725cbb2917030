"""For all tests."""

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest

# Before torch is imported: tests run on several workers, and in several processes each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine with a GPU that is there for `pytest -m gpu` alone need not have it.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # How long an example takes says nothing on a busy machine. CI tries the same examples each time; new ones are
    # looked for while working.
    settings.register_profile("working", deadline=None)
    settings.register_profile("ci", deadline=None, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "working")


@pytest.fixture(autouse=True)
def _forget_the_indexers_scale() -> Iterator[None]:
    """Megatron's sparse attention keeps a scale in its class, in the shape that it first had: a backward pass without
    Megatron's schedules would leave one there that the next test's schedules cannot take."""
    yield
    if dsa := sys.modules.get("megatron.core.transformer.experimental_attention_variant.dsa"):
        dsa.DSAIndexerLossAutoScaler.main_loss_backward_scale = None
