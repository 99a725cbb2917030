"""Runs on a real Slurm cluster of two nodes, without accounting and with it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, Place

pytestmark = pytest.mark.slurm

TWO_NODES = ["executor.nodes=2", "parallel.tensor=2"]


def losses(place: Place, name: str) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in map(json.loads, place.steps(name)) if "loss" in line}


def test_tensor_parallel_over_two_nodes(place: Place) -> None:
    """The same recipe here and on the cluster, by one word."""
    done = place.pretrain("two", 6, *TWO_NODES)
    assert done.returncode == 0, done.stderr + place.logs()
    assert "2 processes on cpu: data parallel 1, tensor 2" in done.stdout
    assert place.status("two") == "two is finished"
    here = place.hybrid("pretrain", "tiny", "name=here", "trainer.max_steps=6", *SMALL, "parallel.tensor=2")
    assert here.returncode == 0, here.stderr
    assert losses(place, "two") == losses(place, "here")
    # The same command again says that there is nothing left to do.
    assert "finished: step 6 of 6 is done" in place.pretrain("two", 6, *TWO_NODES).stdout


def test_a_failing_job_fails_the_command(place: Place) -> None:
    done = place.pretrain("fails", 6, *TWO_NODES, "data.path=/no/such/folder")
    assert done.returncode == 2
    assert "data.path: there is no folder '/no/such/folder'" in done.stdout
    state = place.hybrid("status", "fails", "--json")
    found = json.loads(state.stdout)
    assert (found["status"], found["detail"]) == ("failed", "exit code 2")
    assert "  data.path: there is no folder '/no/such/folder'" in place.hybrid("status", "fails").stdout


def test_a_rank_that_is_killed_is_named(place: Place) -> None:
    place.send("killed", 100000, *TWO_NODES)
    place.wait(lambda: len(place.steps("killed")) > 3, "some steps")
    (pid,) = [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/environ")
        if b"recipes.worker" in (path.parent / "cmdline").read_bytes() and b"RANK=1\0" in read(path)
    ]
    subprocess.run(["kill", "-KILL", pid], check=True)
    done = place.hybrid("logs", "-f", "killed")
    assert done.returncode == 137
    assert re.search(r"rank 1 on \S+ died of SIGKILL", done.stdout)
    assert place.status("killed") == "killed is failed: exit code 137"


def test_cancel_saves_and_says_so(place: Place) -> None:
    job = place.send("stop", 100000, *TWO_NODES)
    place.wait(lambda: len(place.steps("stop")) > 3, "some steps")
    assert re.match(r"stop is running: on n\[1-2\]", place.status("stop"))
    again = place.pretrain("stop", 100000, "--detach")
    assert again.returncode == 2
    assert again.stderr.startswith("name: the run 'stop' is running")
    assert f"job {job} is cancelled" in place.hybrid("cancel", "stop").stdout
    place.wait(lambda: "running" not in place.status("stop"), "the end of the job")
    assert place.status("stop") == "stop is cancelled"
    assert re.search(r"interrupted: step \d+ is saved", place.hybrid("logs", "stop").stdout)
    assert place.hybrid("cancel", "stop").stderr.startswith("stop is not running: cancelled")


def test_a_queued_job_can_be_cancelled(place: Place) -> None:
    place.send("waits", 6, "executor.dependency=afterok:999999999", "executor.sbatch={hold: ''}")
    assert place.status("waits").startswith("waits is queued")
    place.hybrid("cancel", "waits")
    place.wait(lambda: "queued" not in place.status("waits"), "the end of the job")


def test_a_preempted_job_goes_on_to_the_losses_of_an_undisturbed_one(place: Place) -> None:
    place.send("undisturbed", 60, *TWO_NODES)
    place.send("preempted", 60, *TWO_NODES)
    place.wait(lambda: len(place.steps("preempted")) > 10, "ten steps")
    place.cluster.run(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    done = place.hybrid("logs", "-f", "preempted")
    assert done.returncode == 0, done.stdout
    assert "== stopped; queued again, 1 of 10" in done.stdout
    assert re.search(r"goes on from step \d+", done.stdout)
    assert place.hybrid("logs", "-f", "undisturbed").returncode == 0
    assert losses(place, "preempted") == losses(place, "undisturbed")


def test_the_time_limit_is_no_end(place: Place) -> None:
    """Slurm warns, the run saves, the job queues itself again, as often as it is told to."""
    place.send("long", 100000, "executor.time=2", "executor.warning=90", "executor.requeues=1")
    done = place.hybrid("logs", "-f", "long")
    assert "== stopped; queued again, 1 of 1" in done.stdout
    assert "== stopped; not queued again, that was done 1 times" in done.stdout
    assert done.returncode == 138
    assert place.status("long") == "long is stopped: after saving"


def test_a_chain_goes_on_where_the_last_job_stopped(place: Place) -> None:
    done = place.pretrain("chain", 100000, "executor.time=2", "executor.warning=90", "--repeat", "2")
    assert len(re.findall(r"^== chain: job \d+ on ", done.stdout, re.MULTILINE)) == 2
    assert re.search(r"goes on from step \d+", done.stdout)
    assert done.returncode == 138
    assert place.status("chain") == "chain is stopped: after saving"


def test_a_chain_ends_when_its_run_does(place: Place) -> None:
    done = place.pretrain("short", 6, "--repeat", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the run ended in a job before this one, with exit code 0") == 2
    done = place.pretrain("broken", 6, "--repeat", "2", "data.path=/no/such/folder")
    assert done.returncode == 2
    assert "the run ended in a job before this one, with exit code 2" in done.stdout


def test_a_sweep_is_an_array_and_a_table(place: Place) -> None:
    done = place.pretrain("sweep", 6, "--sweep", "optimizer.lr=1e-3,3e-3", "trainer.seed=1,2")
    assert done.returncode == 0, done.stderr + place.logs()
    table = done.stdout[done.stdout.index("run      ") :].splitlines()
    assert table[0].split() == ["run", "optimizer.lr", "trainer.seed", "state", "step", "loss", "validation", "loss"]
    assert [line.split()[:5] for line in table[1:]] == [
        [f"sweep-{number}", lr, seed, "finished", "6"]
        for number, (lr, seed) in enumerate([("1e-3", "1"), ("1e-3", "2"), ("3e-3", "1"), ("3e-3", "2")], start=1)
    ]
    assert place.hybrid("status", "sweep").stdout.splitlines() == table
    assert place.status("sweep-3") == "sweep-3 is finished"
    assert "run folder runs/sweep-3" in place.hybrid("logs", "sweep-3").stdout


def test_two_jobs_at_once_on_one_node(place: Place) -> None:
    """nemo-run's port is fixed, and the second of them fails."""
    names = ["left", "right"]
    for name in names:
        place.send(name, 30, *TWO_NODES)
    for name in names:
        done = place.hybrid("logs", "-f", name)
        assert done.returncode == 0, done.stdout
    assert losses(place, "left") == losses(place, "right")


def test_runs_are_known_after_slurm_has_forgotten_them(place: Place) -> None:
    place.pretrain("old", 6)
    place.pretrain("bad", 6, "data.path=/no/such/folder")
    place.wait(lambda: not place.cluster.run("squeue", "--noheader", "--states=all"), "Slurm to forget (MinJobAge)")
    listed = place.hybrid("runs").stdout.splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [["bad", "failed"], ["old", "finished"]]


def test_values_of_the_environment_arrive(place: Place) -> None:
    value = 'it\'s "$HOME" `id` $(id) \\ \n é {{ x }} /nemo_run/x $$ !!'
    (place.folder / "plug.py").write_text(f"def greet(around, built):\n    around.env['greeting'] = {value!r}\n")
    interpreter = place.folder / "python"
    interpreter.write_text(f'#!/bin/bash\nprintf %s "$greeting" > {place.folder}/seen\nexec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    done = place.pretrain("env", 1, "plugins=[plug.py:greet]", f"executor.python={interpreter}")
    assert done.returncode == 0, done.stderr + place.logs()
    assert (place.folder / "seen").read_text() == value


def test_an_unknown_account_is_refused_where_there_are_accounts(place: Place) -> None:
    done = place.pretrain("account", 1, "--detach", "executor.account=nope")
    if not place.cluster.accounting:
        assert done.returncode == 0
        return
    assert done.returncode == 1
    assert "sbatch: error: Batch job submission failed: Invalid account" in done.stderr
    assert place.pretrain("account", 1, "--detach", "executor.account=research").returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["executor.partition=nope"], "sbatch: error: invalid partition specified: nope"),
        (["executor.constraint=nope"], "sbatch: error: "),
        (["executor.sbatch={nope: x}"], "sbatch: unrecognized option"),
        (["executor.mounts=[/no/such]", "executor.container=img"], "executor.mounts: there is no '/no/such'"),
        (["executor.container=/no/such.sqsh"], "executor.container: there is no image '/no/such.sqsh'"),
        (["executor.python=/no/python"], "executor.python: '/no/python' on this machine cannot be run"),
        (["executor.memory=900G"], "sbatch: error: "),
    ],
)
def test_what_slurm_and_the_cluster_refuse_is_passed_on(place: Place, words: list[str], says: str) -> None:
    done = place.pretrain("refused", 6, "--detach", *words)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert not (place.folder / "runs" / "refused").exists()


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
