"""A checkpoint of one kind of Adam, taken up by another."""

from pathlib import Path

from hybrid.costs.pipeline import stage_pattern
from hybrid.training import distributed, optimizer_parts
from hybrid.training.setup import set_up
from tests import toy


def test_settings_that_the_other_optimizer_had_not_are_its_own_again(tmp_path: Path) -> None:
    run = toy.settings(tmp_path)
    world = distributed.start(run.parallel, None, seed=1)
    try:
        training = set_up(run, stage_pattern(run), world.device)
        group = training.optimizer.param_groups[0]
        eps = group.pop("eps")
        group.update(lr=0.5, step=3.0)
        optimizer_parts.complete(training.optimizer)
        assert (group["eps"], group["lr"], group["step"]) == (eps, 0.5, 3)
        assert type(group["step"]) is int
    finally:
        distributed.stop()
