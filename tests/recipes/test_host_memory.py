"""A run that does not fit into the memory of a machine without GPUs is refused, not killed."""

from pathlib import Path

import pytest

from hybrid.errors import ConfigError
from recipes import apply, host_memory, hybrid_8b, launch, sweeps, tiny


@pytest.fixture(autouse=True)
def sixteen_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(host_memory, "visible_gpus", lambda: 0)
    monkeypatch.setattr(host_memory, "available", lambda: 16.0 * 2**30)
    return tmp_path


def test_a_model_that_does_not_fit_is_refused_with_both_numbers_and_the_way_out(sixteen_gib: Path) -> None:
    with pytest.raises(ConfigError) as error:
        launch(apply(hybrid_8b(), ["data=mock"]))
    (problem,) = error.value.problems
    assert problem.place == "model"
    assert "in 4 processes on CPUs (145.1 GiB of weights, gradients and optimizer)" in problem.message
    assert "no GPU and 16.0 GiB free; take a smaller model (shrink(RECIPE)" in problem.message
    assert not list(sixteen_gib.iterdir())


def test_states_that_fit_leave_the_batch_to_be_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available", lambda: 50e6)
    with pytest.raises(ConfigError, match=r"take a smaller trainer\.micro_batch_size or data\.sequence_length"):
        sweeps.launch_sweep([sweeps.Point({}, [])], lambda words: apply(tiny(), words))


def test_a_dry_run_only_notes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(apply(hybrid_8b(), ["data=mock"]), dry_run=True) == 0
    assert capsys.readouterr().err.startswith("note: model: takes at least ")


def test_what_fits_and_a_machine_with_gpus_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(tiny(), dry_run=True) == 0
    monkeypatch.setattr(host_memory, "visible_gpus", lambda: 4)
    assert launch(apply(hybrid_8b(), ["data=mock"]), dry_run=True) == 0
    assert "GiB" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "limit"),
    [
        ("0::/job/step\n", "job/memory.max"),
        ("0::/what/the/host/calls/it\n", "memory.max"),
        ("5:cpu:/\n4:memory:/job\n", "memory/job/memory.limit_in_bytes"),
    ],
)
def test_limits_of_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, limit: str) -> None:
    monkeypatch.undo()
    (tmp_path / "own").write_text(own)
    file = tmp_path / "groups" / limit
    file.parent.mkdir(parents=True)
    file.write_text("1048576\n")
    (tmp_path / "groups" / "job" / "step").mkdir(parents=True, exist_ok=True)
    (tmp_path / "groups" / "job" / "step" / "memory.max").write_text("max\n")
    assert host_memory.available(tmp_path / "groups", tmp_path / "own") == 2**20
