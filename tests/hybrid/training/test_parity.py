"""The same training however it is split: losses and gradient norms of 20 steps from one checkpoint, in several layouts.

`tests/parity.py` says how far apart they may be. `benchmarks/parity.py` makes the whole table of models and layouts;
these are the rows that find most: every kind of layer, and every kind of split.
"""

import pytest

from tests import parity

CASES = {
    "Mamba-2, attention, MLP, MoE, MTP": ["TP2 + SP", "VPP2", "CP2", "EP2"],
    "Mamba-1, attention, MLP": ["TP2", "PP2, uneven", "CP2", "DP2, overlapped", "TP2 x PP2"],
    "gated delta net, latent and sparse attention, MLP": ["TP2 + SP", "CP2"],
}
# Those whose checkpoints differ in what a rank holds.
RESHARDED = {
    **CASES,
    "Mamba-1, attention, MLP": ["PP2, uneven", "TP2 x PP2"],
    "gated delta net, latent and sparse attention, MLP": ["TP2 + SP"],
}

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[parity.Row], list[tuple[str, str, str]]]:
    return parity.compare(tmp_path_factory.mktemp("parity"), CASES, RESHARDED)


@pytest.mark.parametrize(("model", "layout"), [(model, layout) for model in CASES for layout in CASES[model]])
def test_a_layout_trains_as_one_process_does(compared, model: str, layout: str) -> None:
    (row,) = (row for row in compared[0] if (row.model, row.layout) == (model, layout))
    assert 0 < row.rounding.loss < 1e-3 and 0 < row.rounding.grad_norm < 1e-2
    assert row.holds, row


def test_the_checkpoint_of_each_layout_loads_into_every_other_bit_for_bit(compared) -> None:
    assert compared[1] == []
