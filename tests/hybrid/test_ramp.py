"""The growing batch against Megatron's calculator of batches that grow in steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.config import TrainerConfig
from hybrid.ramp import Ramp

ramps = st.builds(
    lambda start, increment, rises, samples: Ramp(start, increment, samples, start + increment * rises),
    st.integers(1, 32),
    st.integers(1, 32),
    st.integers(1, 20),
    st.integers(1, 5000),
)


@pytest.mark.parametrize("ramp", [Ramp(16, 16, 1000, 64), Ramp(32, 8, 5000, 256), Ramp(8, 4, 100, 12)])
def test_every_batch_is_the_one_that_megatron_takes(ramp: Ramp) -> None:
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    rises = (ramp.full - ramp.start) // ramp.increment
    schedule = [f"{-(-k * ramp.samples // rises)}:{ramp.start + k * ramp.increment}" for k in range(rises + 1)]
    theirs = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, " ".join(schedule))
    consumed = 0
    for _ in range(200):
        theirs.update(consumed, False)
        assert ramp.batch(consumed) == theirs.get_current_global_batch_size(), consumed
        consumed += ramp.batch(consumed)


@given(ramps, st.integers(0, 3000))
def test_steps_and_samples_are_those_of_counting(ramp: Ramp, steps: int) -> None:
    consumed = 0
    for _ in range(steps):
        consumed += ramp.batch(consumed)
    assert ramp.consumed(steps) == consumed
    assert ramp.steps(consumed) == steps
    assert ramp.steps(consumed + ramp.batch(consumed) - 1) == steps


def test_without_a_ramp_all_steps_are_alike() -> None:
    trainer = TrainerConfig(max_samples=100, global_batch_size=8)
    assert (trainer.steps, trainer.ramp.batch(0), trainer.ramp.consumed(3)) == (12, 8, 24)


def test_a_run_in_samples_takes_more_steps_while_the_batch_grows() -> None:
    trainer = TrainerConfig(max_samples=100, global_batch_size=16, rampup_batch_size=[8, 8, 32])
    assert trainer.steps == 4 + 4 and trainer.ramp.consumed(8) == 32 + 64
    assert TrainerConfig(max_steps=8, global_batch_size=16, rampup_batch_size=[8, 8, 32]).samples == 96
