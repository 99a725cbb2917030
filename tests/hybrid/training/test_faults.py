"""What a run does when something goes wrong in it; each fault is injected into a real run."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid import settings_file
from hybrid.config import FaultsConfig, Settings
from hybrid.errors import UserError
from hybrid.training import faults, folder, watchdog
from hybrid.training.faults import BadStep, Judge
from hybrid.training.loop import train
from tests import toy


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    run = toy.settings(tmp_path_factory.mktemp("faults"), "whole", steps=6)
    train(run)
    return run


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, float]]:
    """Gradient norms that a run is to see, by how many it has seen before."""
    wrong: dict[int, float] = {}
    update, seen = faults.update, [0]

    def disturbed(optimizer: Any, judge: Any) -> float:
        seen[0] += 1
        return update(optimizer, lambda norm: judge(wrong.pop(seen[0], norm)))

    monkeypatch.setattr(faults, "update", disturbed)
    yield wrong


def test_a_norm_that_is_no_number_stops_the_run_and_changes_nothing(
    undisturbed: Settings, tmp_path: Path, norms: dict[int, float]
) -> None:
    norms[4] = math.nan
    run = replace(undisturbed, folder=str(tmp_path))
    with pytest.raises(UserError, match="step 4: the gradient norm is nan; nothing of this step is kept"):
        train(run)
    # What `hybrid status` shows of it afterwards.
    assert "failed: step 4: the gradient norm is nan" in (tmp_path / "whole/log.txt").read_text().splitlines()[-1]
    train(run)
    assert toy.metrics(run) == toy.metrics(undisturbed)


def test_a_skipped_step_leaves_its_update_out_and_reads_on(
    undisturbed: Settings, tmp_path: Path, norms: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    norms[4] = math.inf
    run = replace(undisturbed, folder=str(tmp_path), faults=FaultsConfig(on_nan="skip"))
    train(run)
    assert "warning: step 4: the gradient norm is inf; its update is left out" in capsys.readouterr().out
    losses, whole = toy.metrics(run), toy.metrics(undisturbed)
    assert [losses[step] for step in (1, 2, 3)] == [whole[step] for step in (1, 2, 3)]
    assert list(losses) == [1, 2, 3, 5, 6]
    # The schedule has gone on with the data.
    assert toy.metrics(run, "lr") == {step: lr for step, lr in toy.metrics(undisturbed, "lr").items() if step != 4}


def test_a_rollback_takes_up_the_last_checkpoint_and_reads_on(
    undisturbed: Settings, tmp_path: Path, norms: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    norms[4] = math.nan
    run = replace(undisturbed, folder=str(tmp_path), faults=FaultsConfig(on_nan="rollback"))
    train(run)
    assert "rolled back to the checkpoint of step 2, and reads on after the bad batch" in " ".join(
        capsys.readouterr().out.split()
    )
    assert list(toy.metrics(run)) == [1, 2, 3, 5, 6]
    # Another course from here on: step 5 has the weights of step 2, and the batch and learning rate of step 5.
    assert toy.metrics(run)[5] != toy.metrics(undisturbed)[5]
    assert toy.metrics(run, "lr")[6] == toy.metrics(undisturbed, "lr")[6]


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(tmp_path: Path, norms: dict[int, float]) -> None:
    norms[1] = math.nan
    run = toy.settings(tmp_path)
    run.faults = FaultsConfig(on_nan="rollback")
    with pytest.raises(UserError, match="step 1: a bad step, and no checkpoint yet to roll back to"):
        train(run)


def test_a_spike_is_a_norm_far_above_the_usual() -> None:
    judge = Judge(FaultsConfig(spike_factor=5.0, on_spike="rollback"))
    for number in range(30):
        judge.norm(1.0 + number % 3)
    judge.norm(9.9)
    with pytest.raises(BadStep, match=r"the gradient norm is 10\.1, usual is 2") as bad:
        judge.norm(10.1)
    assert bad.value.policy == "rollback"
    # A resumed run judges by the norms that its checkpoint carries.
    resumed = Judge(FaultsConfig(spike_factor=5.0))
    resumed.remember(judge.norms)
    with pytest.raises(BadStep):
        resumed.norm(10.1)


def test_too_many_bad_steps_stop_a_run_whatever_its_policy() -> None:
    judge = Judge(FaultsConfig(limit=2))
    bad = BadStep("the loss is nan", "skip")
    for step in (5, 10, 1006):  # the first is forgotten by then
        judge.count(step, bad)
    with pytest.raises(UserError, match="step 1007: the loss is nan, and 2 of the 1,000 steps before were bad, too"):
        judge.count(1007, bad)


def test_a_full_disk_stops_with_the_last_checkpoint_intact(undisturbed: Settings, tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk's: the first save fits, then there is no room for one."""
    run = replace(undisturbed, folder=str(tmp_path))
    train(replace(run, trainer=replace(run.trainer, max_steps=2)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"iter_0000004: this checkpoint was not saved \(File too large\)"):
            train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert folder.checkpoint_steps(tmp_path / "whole/checkpoints") == [2]
    assert not list((tmp_path / "whole/checkpoints").glob(".*"))


def test_a_process_that_hangs_leaves_its_stacks_in_the_folder_of_the_run(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from hybrid.training.watchdog import Watchdog

def wait_for_godot():
    time.sleep(600)

with Watchdog(0.5, 3, Path({str(tmp_path)!r})) as watchdog:
    watchdog.beat("act two")
    wait_for_godot()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=toy.ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == watchdog.EXIT_CODE
    assert re.match(r"rank 3 made no progress for \d+ s \(faults.hang_seconds\) in: act two\. This", done.stderr)
    stacks = tmp_path / "hung_rank3.txt"
    assert "wait_for_godot" in done.stderr and "wait_for_godot" in stacks.read_text()
    assert f"in: act two; the stacks of its threads are in {stacks}" in (tmp_path / "log.txt").read_text()


# Real processes from here on: `start`s a run on its own, and disturbs it from outside.


def background(run: Settings, processes: int, **environment: str) -> "subprocess.Popen[str]":
    path = Path(run.folder) / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings_file.to_dict(run)))
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["recipes.torchrun", str(path.parent / "logs"), "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m"]
    variables = {**os.environ, "PYTHONPATH": str(toy.ROOT), "OMP_NUM_THREADS": "1", **environment}
    output = subprocess.PIPE
    return subprocess.Popen(
        [*command, "tests.toy", str(path)], cwd=toy.ROOT, env=variables, stdout=output, stderr=output, text=True
    )


def wait_for_step(run: Settings, step: int, process: "subprocess.Popen[str]") -> None:
    metrics = Path(run.folder) / run.name / "metrics.jsonl"
    while process.poll() is None:
        if metrics.is_file() and any(json.loads(line)["step"] >= step for line in _whole_lines(metrics)):
            return
        time.sleep(0.01)
    out, err = process.communicate()
    raise AssertionError(f"ended before step {step}: {out[-2000:]}{err[-4000:]}")


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_exit_code_asks_for_another_start(tmp_path: Path, number: signal.Signals) -> None:
    """128 + the signal: what `recipes/slurm_script.py` queues a job again for."""
    run = toy.settings(tmp_path, steps=100_000, checkpoint={"save_interval": 100_000, "asynchronous": True})
    process = background(run, processes=2)
    wait_for_step(run, 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 128 + number, err
    step = folder.latest_step(Path(run.folder) / "toy/checkpoints")
    assert f"interrupted: step {step} is saved" in out
    assert max(toy.metrics(run)) == step


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_hung_rank_shows_its_threads_and_ends_the_run(tmp_path: Path) -> None:
    """Rank 1 sleeps in its third batch; both ranks' watchdogs bite, since both make no progress."""
    run = toy.settings(tmp_path, "hangs", steps=100)
    run.faults = FaultsConfig(hang_seconds=60)  # the steps before take long on a busy machine
    process = background(run, processes=2)
    out, err = process.communicate(timeout=600)
    assert process.returncode == watchdog.EXIT_CODE, out + err
    assert re.search(r"made no progress for \d+ s \(faults.hang_seconds\) in: step 3", err), err
    assert "most recent call first" in err
    log = (Path(run.folder) / "hangs/log.txt").read_text()
    # Where rank 1 was a moment earlier, rank 0 has lost it before its own time was up.
    bitten = "rank 0 made no progress for" in log and "hangs/hung_rank0.txt" in log
    assert bitten or "Connection closed by peer" in log
    assert "hang_in_the_third_batch" in (Path(run.folder) / "hangs/hung_rank1.txt").read_text()
    assert "hang_in_the_third_batch" in err + "".join(path.read_text() for path in tmp_path.rglob("stderr.log"))
