"""The random numbers of a checkpoint, on a device of the kind that saved it and on another."""

from pathlib import Path

import pytest
import torch

import hybrid.quiet  # noqa: F401
from hybrid.training import checkpoint
from hybrid.training.distributed import start, stop
from tests import toy


def test_random_numbers_go_on_from_a_checkpoint_of_the_same_kind_of_device_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(toy.settings(tmp_path).parallel, None, seed=1)
    try:
        state = checkpoint._random_state().data[0]
        following = torch.rand(3)
        checkpoint._set_random_state(state)
        assert torch.rand(3).equal(following) and not capsys.readouterr().out
        # As a checkpoint from the other kind of machine: its generator's state has another size.
        elsewhere = {**state, "device": "elsewhere", "cuda_rng_state": torch.zeros(16, dtype=torch.uint8)}
        before = torch.get_rng_state()
        checkpoint._set_random_state(elsewhere)
        assert torch.get_rng_state().equal(before)
        assert (
            "random numbers start anew: the checkpoint has those of another kind of device" in capsys.readouterr().out
        )
    finally:
        stop()
