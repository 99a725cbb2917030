"""Every recipe takes a real training step, shrunken: the same layer kinds, variants and rules, on the CPU."""

import math
from pathlib import Path

import pytest

from recipes import apply, registry, resolve, settings, shrink
from tests import toy

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", registry.entries())
def test_a_recipe_takes_a_step(name: str, tmp_path: Path) -> None:
    from hybrid.training.loop import train

    changes = ["data=mock", f"data.cache={tmp_path / 'cache'}", "data.num_workers=0", f"folder={tmp_path}"]
    run = settings(apply(shrink(resolve(name), steps=1), changes))
    train(run)
    ((step, loss),) = toy.metrics(run).items()
    # New weights say little about which token comes next: the loss is near that of a guess.
    assert step == 1 and loss == pytest.approx(math.log(run.model.padded_vocab_size), abs=0.5)
    assert 0 < toy.metrics(run, "grad_norm")[1] < math.inf
