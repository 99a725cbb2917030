"""Runs on a real Slurm cluster, without accounting and with it."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from conftest import STEPS, Place, once, story

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TWO_NODES = ["executor.nodes=2", "parallel.tensor=2"]
# A run that is stopped before it gets there.
ENDLESS = 100000


@story
def test_two_runs_at_once_on_the_same_nodes_of_which_one_yields_and_goes_on(place: Place) -> None:
    """nemo-run's port is fixed, and the second of them fails. Their losses are the same, since their seeds are."""
    with_gpus = [*TWO_NODES, "executor.gpu_request=gpus_per_node"]
    # Each begins when it is looked at, and is paused, so that they are there at once, however fast this machine is.
    held = [*with_gpus, "executor.sbatch={hold: ''}"]
    for name, more in (("undisturbed", []), ("yields", ["executor.partition=spare"])):
        (job,) = place.send(name, STEPS, *held, *more)
        place.cluster.run("scontrol", "release", job)
        pause(place, name)
    both = [place.status(name) for name in ("undisturbed", "yields")]
    assert both == ["undisturbed is running: on n[1-2]", "yields is running: on n[1-2]"]
    send_signal(place, "undisturbed", signal.SIGCONT)
    # Both have one of the two GPUs of each node, and this wants one. Slurm itself lets the paused job go on to its end.
    wants = ["--partition=main", "--nodelist=n1", "--gpus-per-node=1", "--output=/dev/null", "--wrap=:"]
    place.cluster.run("sbatch", *wants)
    done = place.hybrid("logs", "-f", "yields", follows=True)
    assert done.returncode == 0, done.stdout
    assert "== stopped; queued again, 1 of 10" in done.stdout
    assert re.search(r"goes on from step \d+", done.stdout)
    done = place.hybrid("logs", "-f", "undisturbed", follows=True)
    assert done.returncode == 0, done.stdout
    assert "2 processes on cpu: data parallel 1, tensor 2" in done.stdout
    assert place.losses("yields") == place.losses("undisturbed")
    assert list(place.losses("undisturbed"))[-1] == STEPS


def test_the_same_recipe_here_and_on_a_cluster_by_one_word(place: Place, losses_here: dict[int, float]) -> None:
    test_two_runs_at_once_on_the_same_nodes_of_which_one_yields_and_goes_on(place)
    assert place.losses("undisturbed") == losses_here


@story
def test_a_chain_goes_on_where_slurm_stopped_a_job_and_is_cancelled_as_a_whole(place: Place) -> None:
    jobs = place.send("chain", ENDLESS, "executor.warning=180", "--repeat", "2")
    place.wait_for_steps("chain")
    assert sorted(place.queue(*jobs)) == ["PENDING", "RUNNING"]
    # Slurm looks at time limits every 30 seconds and warns before this one has passed, even if the next minute begins.
    minutes = place.cluster.run("squeue", "--noheader", "-j", jobs[0], "-o", "%M").split(":")[-2]
    place.cluster.run("scontrol", "update", f"JobId={jobs[0]}", f"TimeLimit={int(minutes) + 3}")
    place.wait(lambda: re.search(r"goes on from step \d+", place.log("chain")), "the second job")
    again = place.pretrain("chain", ENDLESS, "--detach")
    assert again.returncode == 2
    assert again.stderr.startswith("name: the run 'chain' is running")
    place.wait_for_steps("chain")
    assert f"job {jobs[1]} is cancelled" in place.hybrid("cancel", "chain").stdout
    done = place.hybrid("logs", "-f", "chain", follows=True)
    assert len(re.findall(r"^== chain: job \d+ on ", done.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"interrupted: step \d+ is saved", done.stdout)) == 2
    assert done.returncode in (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
    assert place.status("chain") == "chain is cancelled"
    assert place.hybrid("cancel", "chain").stderr.startswith("chain is not running: cancelled")


@story
def test_a_failing_job_fails_the_command_and_ends_its_chain(place: Place) -> None:
    (place.folder / "empty").mkdir()
    done = place.pretrain("fails", 6, "data.path=empty", "--repeat", "2")
    assert done.returncode == 2
    assert "data.path: there are no text files in 'empty'" in done.stdout
    assert "the run ended in a job before this one, with exit code 2" in done.stdout
    record = json.loads((place.folder / "runs" / "fails" / "job.json").read_text())
    place.wait(lambda: not place.queue(*record["ids"]), "Slurm to forget (MinJobAge)")
    found = json.loads(place.hybrid("status", "fails", "--json").stdout)
    assert (found["status"], found["detail"]) == ("failed", "exit code 2")
    assert "  data.path: there are no text files in 'empty'" in place.hybrid("status", "fails").stdout
    assert ["fails", "failed"] in [line.split()[:2] for line in place.hybrid("runs").stdout.splitlines()]


@story
def test_a_sweep_is_an_array_and_a_table(place: Place) -> None:
    """With a value in the environment that is hard to quote."""
    value = 'it\'s "$HOME" `id` $(id) \\ \n é {{ x }} /nemo_run/x $$ !!'
    (place.folder / "plug.py").write_text(f"def greet(around, built):\n    around.env['greeting'] = {value!r}\n")
    interpreter = place.folder / "python"
    interpreter.write_text(f'#!/bin/bash\nprintf %s "$greeting" > {place.folder}/seen\nexec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    arranged = ["plugins=[plug.py:greet]", f"executor.python={interpreter}"]
    done = place.pretrain("sweep", 6, *arranged, "--sweep", "optimizer.lr=1e-3,3e-3")
    assert done.returncode == 0, done.stderr + place.logs()
    assert (place.folder / "seen").read_text() == value
    table = done.stdout[done.stdout.index("run      ") :].splitlines()
    assert table[0].split() == ["run", "optimizer.lr", "state", "step", "loss", "validation", "loss"]
    assert [line.split()[:4] for line in table[1:]] == [
        [f"sweep-{number}", lr, "finished", "6"] for number, lr in enumerate(["1e-3", "3e-3"], start=1)
    ]
    assert place.hybrid("status", "sweep").stdout.splitlines() == table
    assert place.status("sweep-2") == "sweep-2 is finished"
    assert "run folder runs/sweep-2" in place.hybrid("logs", "sweep-2").stdout


@once
@story
def test_a_rank_that_is_killed_is_named_with_its_last_lines(place: Place) -> None:
    place.send("killed", ENDLESS, *TWO_NODES)
    place.wait_for_steps("killed")
    (rank,) = [pid for pid in workers(place, "killed") if b"\0RANK=1\0" in read(Path(f"/proc/{pid}/environ"))]
    os.kill(rank, signal.SIGKILL)
    done = place.hybrid("logs", "-f", "killed", follows=True)
    assert done.returncode == 137
    assert re.search(r"rank 1 on \S+ died of SIGKILL", done.stdout)
    found = json.loads(place.hybrid("status", "killed", "--json").stdout)
    assert (found["status"], found["detail"]) == ("failed", "exit code 137")
    # After what it wrote itself, if that was anything: warnings of a busy machine.
    assert any(re.fullmatch(r"rank 1 on \S+ died of SIGKILL", line) for line in found["last_lines"])


@once
@story
def test_a_warning_and_a_node_that_fails_are_no_end(place: Place) -> None:
    """The job queues itself again, or Slurm does, as often as it is told to."""
    (job,) = place.send(
        "long", ENDLESS, "executor.partition=apart", "executor.requeues=2", "checkpoint.save_interval=5"
    )
    stops = (
        lambda: place.cluster.run("scancel", "--signal=USR1", job),
        lambda: place.cluster.run("scontrol", "update", "NodeName=n3", "State=DOWN", "Reason=test"),
        lambda: place.cluster.run("scancel", "--signal=USR1", job),
    )
    for starts, stop in enumerate(stops):
        place.wait(lambda: place.log("long").count("goes on from step") == starts, f"restart {starts}")  # noqa: B023
        place.wait_for_steps("long")
        stop()
        place.wait(lambda: not workers(place, "long"), "the end of the run's process")
        if "down" in place.cluster.run("sinfo", "--noheader", "--nodes=n3", "-o", "%T"):
            place.cluster.run("scontrol", "update", "NodeName=n3", "State=RESUME")
    done = place.hybrid("logs", "-f", "long", follows=True)
    assert "== stopped; queued again, 1 of 2" in done.stdout
    assert "== stopped; not queued again, that was done 2 times" in done.stdout
    assert done.returncode == 138
    assert place.status("long") == "long is stopped: goes on with the same command"


def test_a_queued_job_can_be_cancelled_and_an_unknown_account_is_refused_where_there_are_accounts(place: Place) -> None:
    words = ["--detach", "executor.sbatch={hold: ''}"]
    done = place.pretrain("account", 2, *words, "executor.account=nope")
    if place.cluster.accounting:
        assert done.returncode == 2
        assert "sbatch: error: Batch job submission failed: Invalid account" in done.stderr
        done = place.pretrain("account", 2, *words, "executor.account=research")
    assert done.returncode == 0, done.stderr
    assert place.status("account").startswith("account is queued")
    place.hybrid("cancel", "account")
    assert place.status("account") == "account is cancelled"  # of its own accord, when Slurm has forgotten it, too


@once
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["executor.partition=nope"], "sbatch: error: invalid partition specified: nope"),
        (["executor.sbatch={nope: x}"], "sbatch: unrecognized option"),
        (["executor.mounts=[/no/such]", "executor.container=img"], "executor.mounts: there is no '/no/such'"),
        (["executor.container=/no/such.sqsh"], "executor.container: there is no image '/no/such.sqsh'"),
        (["executor.python=/no/python"], "executor.python: '/no/python' on this machine cannot be run"),
    ],
)
def test_what_slurm_and_the_cluster_refuse_is_passed_on(place: Place, words: list[str], says: str) -> None:
    done = place.pretrain("refused", 6, "--detach", *words)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert not (place.folder / "runs" / "refused").exists()


def pause(place: Place, name: str) -> None:
    """Stop the processes of a run in the midst of its steps; they hold what they have."""
    place.wait(lambda: place.steps(name), f"the first step of {name}")
    send_signal(place, name, signal.SIGSTOP)
    assert len(place.steps(name)) < STEPS


def send_signal(place: Place, name: str, number: signal.Signals) -> None:
    for pid in workers(place, name):
        os.kill(pid, number)


def workers(place: Place, name: str) -> list[int]:
    """The processes of a run's ranks; those that they start in turn lead no session."""
    mark = f"{place.folder}/runs/{name}/".encode()
    found = [(int(path.parent.name), read(path)) for path in Path("/proc").glob("[0-9]*/cmdline")]
    pids = [pid for pid, words in found if mark in words and b"recipes.worker\0" in words and b"torchrun" not in words]
    return [pid for pid in pids if leads_a_session(pid)]


def leads_a_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
