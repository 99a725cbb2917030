"""Tests that need a CUDA device and the packages with its kernels: `pytest -m gpu tests/gpu`.

Arranged so that all of them are done in four minutes from empty kernel caches: mamba-ssm's kernels take the cheapest of
their tile sizes instead of trying a dozen, torch.compile stays out, and the runs on the CPU go on beside the rest.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from hybrid.config import Settings
from tests import toy
from tests.gpu import runs

# Products of float32 numbers in float32, not in TF32, so that they can be compared with the reference. Both are read
# when the libraries start, after this.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Read when mamba-ssm's modules are imported: one tile size. How they compute is set back below.
os.environ.setdefault("MAMBA_DETERMINISTIC", "1")
os.environ.pop("TRITON_CACHE_AUTOTUNING", None)  # with it, all sizes are tried


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    import hybrid.quiet  # noqa: F401

    # isort: split
    from mamba_ssm.ops.triton import ssd_combined  # noqa: F401
    from mamba_ssm.utils.determinism import set_deterministic_mode

    set_deterministic_mode(False)


@pytest.fixture(scope="session", autouse=True)
def on_cpu(
    gpu: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[Settings]"]]:
    """The run of each model on the CPU, under way in other processes since the first test, if one will ask for it."""
    wanted = any(name in item.nodeid for item in request.session.items for name in ("test_training", "test_parallel"))
    with ThreadPoolExecutor(len(runs.MODELS)) as pool:
        folder = tmp_path_factory.mktemp("cpu")
        yield {model: pool.submit(_train_on_cpu, runs.on_cpu(folder, model)) for model in runs.MODELS if wanted}


def _train_on_cpu(some: list[Settings]) -> Settings:
    toy.start(some, environment={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"})
    return some[-1]


@pytest.fixture
def alone() -> Iterator[None]:
    """One process with Megatron's parallel state."""
    import hybrid.quiet  # noqa: F401
    from hybrid.config import ParallelConfig
    from hybrid.training.distributed import start, stop

    start(ParallelConfig(), None, 3)
    yield
    stop()
