"""What a run shows: metrics, trackers, profiles, where it came from; and that none of it grows without end."""

import gc
import importlib.util
import io
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from hybrid.config import Settings
from hybrid.costs import flops
from hybrid.errors import ConfigError
from hybrid.training import trackers
from hybrid.training.loop import train
from hybrid.training.metrics import Clock, over_ranks
from hybrid.training.report import Report, thinned
from hybrid.training.step import Stepper
from tests import toy

_PHASES = ("data", "forward_backward", "optimizer", "other")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A run of six steps with a validation and saves, that TensorBoard and the profiler watch."""
    trainer = {"eval_interval": 3, "log_to": ["tensorboard"], "profile": [3, 4], "memory_snapshot": 5}
    run = toy.settings(tmp_path_factory.mktemp("seeing"), "watched", steps=6, trainer=trainer)
    train(run)
    return run


def lines(run: Settings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.folder) / run.name / "metrics.jsonl").open()]


def test_a_line_has_rates_memory_and_the_time_of_each_phase(watched: Settings) -> None:
    steps = [line for line in lines(watched) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert line["samples"] == 4 * line["step"]
        # Saves and validations are no part of a step.
        assert sum(line[f"{phase}_seconds"] for phase in _PHASES) == pytest.approx(line["step_seconds"])
        assert line["tokens_per_second"] == pytest.approx(4 * 64 / line["step_seconds"])
        reached = line["tokens_per_second"] * flops.per_token(watched).total
        assert line["tflops_per_second_per_process"] == pytest.approx(reached / 1e12)
        assert 0.05 < line["memory_gib"] < 20
        assert "mfu" not in line  # nobody knows this CPU's peak
    assert "save_seconds" in steps[4]
    assert "save_seconds" not in steps[1] or steps[1]["save_seconds"] < steps[4]["save_seconds"]


def test_validations_and_saves_have_lines_of_their_own(watched: Settings) -> None:
    assert [line["step"] for line in lines(watched) if "validation_loss" in line] == [3, 6]
    saves = [line for line in lines(watched) if "saved_step" in line]
    assert [line["saved_step"] for line in saves] == [2, 4, 6]
    assert all(line["saved_gib"] > 0 and line["save_stall_seconds"] > 0 for line in saves)


def test_tensorboard_gets_every_number(watched: Settings) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(watched.folder) / "watched/tensorboard"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "validation_bits_per_byte"} <= set(events.Tags()["scalars"])
    recorded = {event.step: event.value for event in events.Scalars("loss")}
    assert recorded == pytest.approx(toy.metrics(watched))


def test_the_profile_is_a_trace_of_the_steps_that_were_asked_for(watched: Settings) -> None:
    trace = json.loads((Path(watched.folder) / "watched/profile/rank0.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if "name" in event]
    assert any("aten::" in name for name in names)
    assert sum(name.startswith("Optimizer.step#") for name in names) == 2
    assert "the profile of steps 3 to 4 is in" in (Path(watched.folder) / "watched/log.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is a snapshot")
def test_a_snapshot_of_a_gpu_that_is_not_there_is_passed_over_and_said(watched: Settings) -> None:
    said = (Path(watched.folder) / "watched/log.txt").read_text()
    assert "trainer.memory_snapshot is passed over: there is no GPU here" in said


def test_a_start_is_recorded_with_versions_machine_and_git(watched: Settings) -> None:
    train(watched)  # finished, but a start all the same
    starts = [json.loads(line) for line in (Path(watched.folder) / "watched/starts.jsonl").open()]
    assert len(starts) == 2
    assert {"torch", "megatron-core"} <= starts[0]["versions"].keys()
    assert starts[0]["device"] == "cpu"
    assert starts[0]["processes"] == 1
    assert starts[0]["git"] is None or {"commit", "branch", "changed"} == starts[0]["git"].keys()
    assert not any("KEY" in name or "TOKEN" in name for name in starts[0]["environment"])


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = toy.settings(tmp_path, "offline", steps=2, trainer={"log_to": ["wandb"]})
    train(run)
    kept = list((Path(run.folder) / "offline/wandb").glob("offline-run-*/run-offline.wandb"))
    assert len(kept) == 1
    assert b"grad_norm" in kept[0].read_bytes()


def test_a_tracker_that_does_not_begin_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    def refuse(**_: object) -> None:
        raise Refused("No API key configured.")

    stand_in = SimpleNamespace(init=refuse, Error=Refused, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)  # pyright: ignore[reportArgumentType]
    says = r"trainer\.log_to: names wandb, which does not begin \(No API key configured\.\); WANDB_MODE=offline"
    with pytest.raises(ConfigError, match=says):
        trackers.connect(toy.settings(tmp_path, trainer={"log_to": ["wandb"]}), tmp_path)


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = toy.settings(tmp_path, trainer={"log_to": ["tensorboard"]}, model={"kernels": "reference"})
    with pytest.raises(ConfigError, match=r"tensorboard is not installed here; `(uv )?pip install tensorboard`"):
        train(run)
    assert not (tmp_path / "runs").exists()


def test_a_phase_within_a_phase_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock()
    with clock("forward_backward"), clock("data"):
        pass
    assert clock.take() == {"other": 1.0 + 5.0, "forward_backward": 2.0 + 4.0, "data": 3.0, "optimizer": 0.0}


def test_the_slowest_rank_is_named() -> None:
    found = over_ranks([1.0, 4.0, 1.5], [0.0, 0.3, 0.1], [2.0, 2.5, 2.25])
    assert found == {
        "data_seconds": 0.3,
        "memory_gib": 2.5,
        "slowest_rank": 1,
        "slowest_seconds": 4.0,
        "median_rank_seconds": 1.5,
    }


def test_metrics_stay_bounded_and_keep_what_is_rare(tmp_path: Path) -> None:
    with Report(tmp_path, 10_000, speaks=True, metrics_bytes=50_000) as report:
        report.begin(0)
        for step in range(1, 10_001):
            report.write(step, {"loss": 1.0, "lr": 1e-3})
            if step % 1000 == 0:
                report.validation(step, "held out", 1.0, 1.0)
    path = tmp_path / "metrics.jsonl"
    assert path.stat().st_size <= 50_100
    kept = [json.loads(line) for line in path.open()]
    assert [line["step"] for line in kept if "held out_loss" in line] == list(range(1000, 10_001, 1000))
    steps = [line["step"] for line in kept if "loss" in line]
    assert steps == sorted(steps)
    # The newest are all there, the older ones evenly, back to the beginning.
    assert steps[-100:] == list(range(9901, 10_001))
    assert steps[0] <= 64
    assert len({b - a for a, b in itertools.pairwise(steps[:100])}) == 1


def test_thinning_leaves_every_second_step_of_the_older_half(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 9)))
    assert [json.loads(line)["step"] for line in thinned(path)] == [2, 4, 5, 6, 7, 8]


def test_plain_lines_come_at_growing_distances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A month of a step a second: about ten thousand lines, not 2.6 million."""
    now = [0.0]
    monkeypatch.setattr("hybrid.training.report.time.monotonic", lambda: now[0])
    steps = 30 * 24 * 3600 // 60
    with Report(tmp_path, steps, speaks=True) as report:
        for step in range(1, steps + 1):
            now[0] += 60.0
            report.step(step, {"loss": 1.0, "lr": 1e-3}, 1000, 60.0, write=False)
    said = capsys.readouterr().out.splitlines()
    assert 7000 < len(said) < 9500
    assert "loss 1.0000  lr 1.00e-03  17 tokens/s" in said[0]


def test_on_a_terminal_the_log_has_the_steps_too_and_the_last_word_is_under_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("hybrid.training.report.Console", partial(Console, file=screen, force_terminal=True))
    with Report(tmp_path, 2, speaks=True) as report:
        report.begin(0)
        for step in (1, 2):
            report.step(step, {"loss": 1.0, "lr": 1e-3}, 1000, 60.0, write=False)
        report.end("interrupted: step 2 is saved")
    assert "2/2" in screen.getvalue()
    assert "2/2" not in screen.getvalue().partition("interrupted: step 2 is saved")[2]
    log = (tmp_path / "log.txt").read_text()
    assert "step 2/2  loss 1.0000  lr 1.00e-03  17 tokens/s  0:00 left\n" in log
    assert log.endswith("interrupted: step 2 is saved\n")


def test_steps_leave_no_objects_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short version of `benchmarks/long_run.py`: Python's objects are counted, which is exact, and not bytes."""
    counts = {}
    step = Stepper.step

    def counted(self: Stepper, data: Any, number: int, batch: int) -> Any:
        if number in (20, 60):
            gc.collect()
            counts[number] = len(gc.get_objects())
        return step(self, data, number, batch)

    monkeypatch.setattr(Stepper, "step", counted)
    model = {"layer_pattern": "M-*", "hidden_size": 16, "num_attention_heads": 2, "mamba_num_groups": 1}
    checkpoint = {"save_interval": 10, "asynchronous": True, "keep_last": 1}
    train(toy.settings(tmp_path, steps=60, model=model, data={"sequence_length": 16}, checkpoint=checkpoint))
    # The last 100 gradient norms and 20 step times are kept; nothing else of a step is.
    assert counts[60] - counts[20] < 100
