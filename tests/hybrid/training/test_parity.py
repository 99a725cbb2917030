"""The same training however it is split: losses of 20 steps from one checkpoint, in several layouts.

How far apart may two layouts be? They compute the same sums in another order, so they differ by rounding, and training
amplifies it. The test measures by how much: two more single-process runs start from weights that are each moved by at
most one unit in the last place, which is what one rounding does. Every operation of a step rounds, not only the
weights, and a layout changes the order of a few sums in each layer, so a layout may be as far from the single process
as 8 times the larger of these two.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid.config import Settings
from tests import toy

STEPS = 20
LAYOUTS: dict[str, dict[str, Any]] = {
    "data parallel 2": {},
    "data parallel 2, overlapped": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "tensor parallel 2": {"tensor": 2},
    "pipeline parallel 2": {"pipeline": 2},
}

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A run with a checkpoint after step 2 and after step 22, and two runs from nearly the same weights."""
    folder = tmp_path_factory.mktemp("parity")
    start = toy.settings(folder, "base", steps=2)
    toy.start([start])
    run = replace(start, trainer=replace(start.trainer, max_steps=2 + STEPS))
    for name in ("single", "moved 0", "moved 1"):
        _go_on_from(start, replace(run, name=name))
    toy.start([replace(run, name=name) for name in ("single", "moved 0", "moved 1")])
    return run


@pytest.fixture(scope="module")
def tolerance(base: Settings) -> float:
    single = toy.metrics(replace(base, name="single"))
    moved = [toy.metrics(replace(base, name=f"moved {seed}")) for seed in (0, 1)]
    apart = max(abs(run[step] - single[step]) for run in moved for step in single)
    assert 0 < apart < 1e-3
    return 8 * apart


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_a_single_process(base: Settings, tolerance: float, layout: str) -> None:
    run = replace(base, name=layout, parallel=replace(base.parallel, **LAYOUTS[layout]))
    _go_on_from(replace(base, name="base"), run)
    toy.start([run], processes=2)
    single, split = toy.metrics(replace(base, name="single")), toy.metrics(run)
    assert list(split) == list(range(3, 3 + STEPS))
    apart = {step: abs(split[step] - single[step]) for step in split}
    assert max(apart.values()) <= tolerance, apart
    norms, split_norms = toy.metrics(replace(base, name="single"), "grad_norm"), toy.metrics(run, "grad_norm")
    assert split_norms == pytest.approx({step: norms[step] for step in split}, rel=1e-3)


def _go_on_from(start: Settings, run: Settings) -> None:
    """Give a run the first checkpoint of another one."""
    source = Path(start.folder) / start.name / "checkpoints/iter_0000002"
    shutil.copytree(source, Path(run.folder) / run.name / "checkpoints/iter_0000002")
