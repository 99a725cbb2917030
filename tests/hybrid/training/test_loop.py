"""A run as its owner meets it: files, interruption, going on, being finished."""

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid.config import Settings
from hybrid.errors import ConfigError, UserError
from hybrid.training import folder
from hybrid.training.loop import train
from tests import toy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """An uninterrupted run of four steps with checkpoints after two and four."""
    run = toy.settings(tmp_path_factory.mktemp("loop"), "whole")
    train(run)
    return run


def test_a_run_leaves_settings_metrics_log_and_checkpoints(finished: Settings) -> None:
    path = Path(finished.folder) / "whole"
    assert folder.checkpoint_steps(path / "checkpoints") == [2, 4]
    assert (path / "checkpoints" / folder.TRACKER_FILE).read_text() == "4"
    assert list(toy.metrics(finished)) == [1, 2, 3, 4]
    assert list(toy.metrics(finished, "validation_bits_per_byte")) == [4]
    log = (path / "log.txt").read_text()
    assert "layer pattern M-M*" in log
    assert "4 layers: 2 Mamba, 1 attention, 1 MLP (ratios Mamba 0.500, attention 0.250, MLP 0.250)" in log


def test_the_first_loss_is_that_of_a_uniform_guess(finished: Settings) -> None:
    # 257 tokens in 260 rows; initial logits are near zero, so the loss is near ln 260 = 5.56.
    assert toy.metrics(finished)[1] == pytest.approx(5.56, abs=0.1)


def test_a_finished_run_says_so_and_trains_no_further(finished: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    train(finished)
    assert "finished: step 4 of 4 is done; raise trainer.max_steps to go on" in capsys.readouterr().out
    assert list(toy.metrics(finished)) == [1, 2, 3, 4]


def test_stopped_and_resumed_gives_bit_equal_losses(finished: Settings, tmp_path: Path) -> None:
    run = replace(finished, folder=str(tmp_path))
    _stop_after(run, 1)
    assert folder.latest_step(tmp_path / "whole/checkpoints") in (1, 2)
    train(run)
    assert toy.metrics(run) == toy.metrics(finished)
    assert toy.metrics(run, "grad_norm") == toy.metrics(finished, "grad_norm")


def test_lines_after_the_checkpoint_are_dropped_on_resume(finished: Settings, tmp_path: Path) -> None:
    run = replace(finished, folder=str(tmp_path))
    _stop_after(run, 1)
    metrics = tmp_path / "whole/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 99, "loss": 0.0}\n{"step": 3, "lo')
    train(run)
    assert toy.metrics(run) == toy.metrics(finished)


def test_data_that_has_changed_is_said_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(5):
        (text / f"{number}.txt").write_text(f"line {number}\n" * 500)
    run = toy.settings(tmp_path, steps=2, data={"path": str(text)})
    train(run)
    (text / "new.txt").write_text("something else\n" * 500)
    train(replace(run, trainer=replace(run.trainer, max_steps=4)))
    assert "warning: the data has changed since" in capsys.readouterr().out


def test_a_run_that_has_not_begun_can_be_changed(finished: Settings, tmp_path: Path) -> None:
    nowhere = replace(finished, folder=str(tmp_path), data=replace(finished.data, path=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="there is no folder"):
        train(nowhere)
    train(replace(finished, folder=str(tmp_path)))


def test_a_run_can_start_from_the_weights_of_another(finished: Settings, tmp_path: Path) -> None:
    source = Path(finished.folder) / "whole"
    run = replace(finished, folder=str(tmp_path), name="tuned")
    run.checkpoint = replace(run.checkpoint, load=str(source))
    train(run)
    # The same first batch: what the other run learned in four steps is there from the start.
    assert toy.metrics(run)[1] < toy.metrics(finished)[1] - 0.1


def test_a_run_of_another_model_is_refused_field_by_field(finished: Settings) -> None:
    other = replace(finished, model=replace(finished.model, hidden_size=64, mamba_state_dim=8))
    other.optimizer = replace(finished.optimizer, warmup_samples=1)  # goes with the length, which may change
    with pytest.raises(ConfigError) as error:
        train(other)
    assert [problem.place for problem in error.value.problems] == ["model.hidden_size", "model.mamba_state_dim"]
    assert "is 64, but the run in" in str(error.value)
    assert "has 32; name this run otherwise" in str(error.value)


def test_a_validation_that_is_not_a_number_ends_the_run_before_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hybrid.training.step import Stepper

    whole = Stepper.validate

    def broken(self: Stepper, held_out: Any, name: str) -> Any:
        losses = whole(self, held_out, name)
        return replace(losses, total=float("nan"))

    monkeypatch.setattr(Stepper, "validate", broken)
    run = toy.settings(tmp_path, steps=2)
    with pytest.raises(UserError, match=r"step 2: the loss of validation is nan; lower optimizer\.lr"):
        train(run)
    assert not list((tmp_path / "whole/checkpoints").glob("iter_*"))
    train(replace(run, faults=replace(run.faults, on_nan="skip")))
    assert "warning: step 2: the loss of validation is nan" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named(finished: Settings, tmp_path: Path) -> None:
    run = replace(finished, folder=str(tmp_path))
    _stop_after(run, 1)
    step = folder.latest_step(tmp_path / "whole/checkpoints")
    assert step is not None
    checkpoint = folder.checkpoint_folder(tmp_path / "whole/checkpoints", step)
    for file in checkpoint.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    (checkpoint / "checksums.json").unlink()  # as one that has none, of an older version
    with pytest.raises(ConfigError, match=f"{checkpoint.name}: this checkpoint is damaged") as error:
        train(run)
    assert f"there is none before it: remove '{checkpoint.parent}' to begin anew" in str(error.value)
    for file in checkpoint.glob("*.distcp"):
        file.unlink()
    (checkpoint.parent / "iter_0000000").mkdir()
    with pytest.raises(ConfigError) as error:
        train(run)
    says = "this checkpoint is damaged (__0_0.distcp: No such file or directory)"
    assert str(error.value) == f"{checkpoint}: {says}; remove it to go on from the one before it, of step 0"


def test_a_run_without_validation_ends_as_others(tmp_path: Path) -> None:
    run = toy.settings(tmp_path, steps=1)
    train(replace(run, trainer=replace(run.trainer, eval_steps=0)))
    assert (tmp_path / "runs" / run.name / "checkpoints/iter_0000001").is_dir()


def test_no_write_permission_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder would be")
    with pytest.raises(ConfigError, match="the run's folder cannot be written: Not a directory"):
        train(toy.settings(tmp_path))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    run = toy.settings(tmp_path, optimizer={"lr": 1e30, "min_lr": 1e30, "clip_grad": 0.0})
    with pytest.raises(
        UserError, match=r"step \d: the (loss|gradient norm) is (nan|inf); nothing of this step is kept"
    ):
        train(run)


def _stop_after(run: Settings, step: int) -> None:
    """Train until metrics.jsonl has that step, then interrupt as Ctrl-C does; the run saves and ends."""
    metrics = Path(run.folder) / run.name / "metrics.jsonl"
    done = threading.Event()

    def interrupt() -> None:
        while not done.is_set():
            if metrics.is_file() and any(json.loads(line)["step"] >= step for line in metrics.open()):
                os.kill(os.getpid(), signal.SIGINT)
                return
            done.wait(0.005)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(SystemExit) as end:
            train(run)
        assert end.value.code == 130
    finally:
        done.set()
        thread.join()


def test_a_run_leaves_no_model_and_no_threads_of_its_groups(tmp_path: Path) -> None:
    threads = []
    for name in ("first", "second", "third"):
        train(toy.settings(tmp_path, name, steps=1))
        threads.append(len(os.listdir("/proc/self/task")))
    assert threads[2] <= threads[0] + 2
