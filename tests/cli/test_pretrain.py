"""`hybrid pretrain` and `hybrid generate` as a user runs them: other processes, signals, a disk that is full."""

import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "model.layer_pattern=M-M*-",
    "model.hidden_size=32",
    "model.mamba_state_dim=16",
    "model.mamba_head_dim=16",
    "data.sequence_length=64",
    "trainer.global_batch_size=4",
    "trainer.micro_batch_size=2",
    "trainer.eval_interval=0",
    "trainer.eval_steps=1",
    "optimizer.warmup_samples=4",
    "checkpoint.save_interval=3",
    "data.source=text",
    f"data.path={Path(sysconfig.get_paths()['stdlib']) / 'email'}",
    "data.cache=cache",
]

pytestmark = pytest.mark.slow


def hybrid(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in `folder`; a traceback is never what a user is to see."""
    done = subprocess.run(
        [sys.executable, "-m", "cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done


def pretrain(folder: Path, name: str, steps: int, *more: str) -> "subprocess.CompletedProcess[str]":
    return hybrid(folder, "pretrain", "tiny", f"name={name}", f"trainer.max_steps={steps}", *SMALL, *more)


def losses(folder: Path, name: str) -> dict[int, float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of 30 steps."""
    folder = tmp_path_factory.mktemp("pretrain")
    done = pretrain(folder, "whole", 30)
    assert done.returncode == 0, done.stderr
    assert "done: 30 steps, checkpoint runs/whole/checkpoints/iter_0000030" in done.stdout
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_cut_off_at_a_random_moment_and_run_again(place: Path, number: signal.Signals) -> None:
    name = f"cut by {number.name}"
    arguments = ["pretrain", "tiny", f"name={name}", "trainer.max_steps=30", *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = place / "runs" / name / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.02)
    time.sleep(random.uniform(0, 1))
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    if process.returncode != 0:  # it was not finished already
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), output
    if process.returncode == 130:
        assert "is saved; the same command goes on from there" in output
    again = pretrain(place, name, 30)
    assert again.returncode == 0, again.stderr
    assert losses(place, name) == losses(place, "whole")


def test_the_same_command_again_says_that_it_is_finished(place: Path) -> None:
    done = pretrain(place, "whole", 30)
    assert done.returncode == 0
    assert "finished: step 30 of 30 is done; raise trainer.max_steps to go on" in done.stdout


def test_two_processes_from_the_command(place: Path) -> None:
    done = pretrain(place, "split", 3, "parallel.tensor=2")
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu: data parallel 1, tensor 2, pipeline 1, context 1" in done.stdout


def test_generate_prints_the_prompt_and_what_follows_the_same_for_the_same_seed(place: Path) -> None:
    first = hybrid(place, "generate", "whole", "--prompt", "def ", "--max-tokens", "20", "--seed", "3")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def ")
    assert len(first.stdout) > len("def \n")
    again = hybrid(place, "generate", "runs/whole", "--prompt", "def ", "--max-tokens", "20", "--seed", "3")
    assert again.stdout == first.stdout


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (["data.source=text", "data.path=nowhere"], "data.path: there is no folder 'nowhere'"),
        (["data.tokenizer=/no/tokenizer.json"], "data.tokenizer: there is no tokenizer '/no/tokenizer.json'"),
        (
            ["data.source=indexed", "data.path=0.5 a 0.5 b"],
            "data.path: there is no file 'a.idx': give the path without",
        ),
        (
            ["data.source=sft", "data.path=chat.jsonl", "data.validation_path=held.jsonl"],
            "data.validation_path: 'held.jsonl' cannot be read: no such file or directory",
        ),
    ],
)
def test_a_run_without_its_data_is_not_started(place: Path, data: list[str], says: str) -> None:
    done = hybrid(place, "pretrain", "tiny", "name=without", *data)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert not (place / "runs/without").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["generate", "whoel", "--prompt", "a"],
            "whoel: is neither a run nor a checkpoint folder; did you mean whole? runs here: ",
        ),
        (["generate", "whole", "--prompt", ""], "prompt: is empty; give the text to go on from"),
        (["pretrain", "tiny", "data.source=text", "data.path=empty"], "data.path: there are no text files in 'empty'"),
        (["pretrain", "tiny", "parallel.tensor=3", "model.hidden_sise=9"], "did you mean hidden_size"),
        (["pretrain", "tiny", "name=whole", "model.hidden_size=64"], "name this run otherwise (name=...)"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(place: Path, arguments: list[str], says: str) -> None:
    (place / "empty").mkdir(exist_ok=True)
    done = hybrid(place, *arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert not (place / "runs/tiny/checkpoints").exists()


def test_a_half_written_checkpoint_is_named(place: Path) -> None:
    assert pretrain(place, "half", 3).returncode == 0
    for file in (place / "runs/half/checkpoints/iter_0000003").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 10])
    done = hybrid(place, "generate", "half", "--prompt", "a")
    assert done.returncode == 2
    assert "runs/half/checkpoints/iter_0000003/__0_0.distcp is truncated" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(place: Path) -> None:
    disk = place / "disk"
    disk.mkdir()
    # Room for two checkpoints of this model (0.6 MB each) and the metrics, not for three.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(disk)], check=True)
    try:
        done = pretrain(place, "full", 30, f"folder={disk}", "checkpoint.keep_last=0")
        assert done.returncode == 1, done.stdout + done.stderr
        assert "this checkpoint was not saved (No space left on device); earlier ones are intact" in done.stderr
        there = sorted(path.name for path in (disk / "full/checkpoints").iterdir())
        assert "iter_0000003" in there
        assert not [name for name in there if name.startswith(".saving")]
        # What is there can be read: the run goes on from it once there is room.
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert pretrain(place, "full", 12, f"folder={disk}").returncode == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)
