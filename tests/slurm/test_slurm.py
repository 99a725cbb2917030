"""Runs on a real Slurm cluster of two nodes, without accounting and with it.

Loading PyTorch is most of what a run costs here, so tests share runs, and jobs that wait for Slurm's clock are sent
before they are looked at.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, WITHOUT, Place

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TWO_NODES = ["executor.nodes=2", "parallel.tensor=2"]
ON_N2 = "executor.sbatch={nodelist: n2}"
# What accounting has nothing to do with is run once.
once = pytest.mark.parametrize("cluster", [WITHOUT], indirect=True)


@pytest.fixture(scope="module")
def chain_of_two(place: Place) -> str:
    """A chain whose first job is warned by Slurm one to two minutes after its start."""
    place.send("chain", 100000, "executor.time=3", "executor.warning=60", "--repeat", "2", ON_N2)
    return "chain"


@pytest.fixture(scope="module")
def two(place: Place) -> "subprocess.CompletedProcess[str]":
    """A run over two nodes, followed to its end."""
    return place.pretrain("two", 6, *TWO_NODES)


@pytest.fixture(scope="module")
def fails(place: Place) -> "subprocess.CompletedProcess[str]":
    """A run whose data is not there."""
    return place.pretrain("fails", 6, "data.path=/no/such/folder")


@pytest.fixture(scope="module")
def pair(place: Place) -> list[str]:
    """Two runs of the same seed that are under way at once on the same two nodes."""
    place.send("undisturbed", 200, *TWO_NODES, "executor.partition=urgent")
    place.send("preempted", 200, *TWO_NODES)
    return ["undisturbed", "preempted"]


@pytest.fixture(scope="session")
def losses_here(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> dict[int, float]:
    """Losses of the recipe on this machine."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "cache").symlink_to(shared_cache)
    here = Place(None, folder)
    done = here.hybrid("pretrain", "tiny", "name=here", "trainer.max_steps=6", *SMALL, "parallel.tensor=2")
    assert done.returncode == 0, done.stderr
    return here.losses("here")


@once
def test_the_chain_is_sent(place: Place, chain_of_two: str) -> None:
    assert re.match("chain is (queued|running)", place.status(chain_of_two))


def test_tensor_parallel_over_two_nodes(
    place: Place, two: "subprocess.CompletedProcess[str]", losses_here: dict[int, float]
) -> None:
    """The same recipe here and on the cluster, by one word."""
    assert two.returncode == 0, two.stderr + place.logs()
    assert "2 processes on cpu: data parallel 1, tensor 2" in two.stdout
    assert place.status("two") == "two is finished"
    assert place.losses("two") == losses_here


def test_a_failing_job_fails_the_command(place: Place, fails: "subprocess.CompletedProcess[str]") -> None:
    assert fails.returncode == 2
    assert "data.path: there is no folder '/no/such/folder'" in fails.stdout
    found = json.loads(place.hybrid("status", "fails", "--json").stdout)
    assert (found["status"], found["detail"]) == ("failed", "exit code 2")
    assert "  data.path: there is no folder '/no/such/folder'" in place.hybrid("status", "fails").stdout


@once
def test_a_rank_that_is_killed_is_named_with_its_last_lines(place: Place) -> None:
    place.send("killed", 100000, *TWO_NODES)
    place.wait(lambda: len(place.steps("killed")) > 3, "some steps")
    (rank,) = [pid for pid in workers(place, "killed") if b"\0RANK=1\0" in read(Path(f"/proc/{pid}/environ"))]
    os.kill(rank, signal.SIGKILL)
    done = place.hybrid("logs", "-f", "killed")
    assert done.returncode == 137
    assert re.search(r"rank 1 on \S+ died of SIGKILL", done.stdout)
    found = json.loads(place.hybrid("status", "killed", "--json").stdout)
    assert (found["status"], found["detail"]) == ("failed", "exit code 137")
    assert re.fullmatch(r"rank 1 on \S+ died of SIGKILL", found["last_lines"][0])


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


def test_two_jobs_at_once_on_one_node(place: Place, pair: list[str]) -> None:
    """nemo-run's port is fixed, and the second of them fails."""
    both = {name: f"{name} is running: on n[1-2]" for name in pair}
    place.wait(lambda: {name: place.status(name) for name in pair} == both, "both at once")
    place.wait(lambda: all(place.steps(name) for name in pair), "the first steps of both")


def test_a_preempted_job_goes_on_to_the_losses_of_an_undisturbed_one(place: Place, pair: list[str]) -> None:
    undisturbed, preempted = pair
    place.wait(lambda: place.steps(preempted), "the first steps")
    place.cluster.run(
        "sbatch", "--partition=urgent", "--nodes=1", "--ntasks=7", "--nodelist=n1", "--output=/dev/null", "--wrap=:"
    )
    done = place.hybrid("logs", "-f", preempted)
    assert done.returncode == 0, done.stdout
    assert "== stopped; queued again, 1 of 10" in done.stdout
    assert re.search(r"goes on from step \d+", done.stdout)
    assert place.hybrid("logs", "-f", undisturbed).returncode == 0
    assert place.losses(preempted) == place.losses(undisturbed)
    assert list(place.losses(undisturbed))[-1] == 200


@once
def test_a_warning_and_a_node_that_fails_are_no_end(place: Place) -> None:
    """What Slurm does at a time limit and at a node's failure, done to it: the job queues itself again, or Slurm does,
    as often as it is told to."""
    job = place.send(
        "long", 100000, "executor.requeues=2", "checkpoint.save_interval=5", "executor.sbatch={nodelist: n2}"
    )
    stops = (
        lambda: place.cluster.run("scancel", "--signal=USR1", job),
        lambda: place.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test"),
        lambda: place.cluster.run("scancel", "--signal=USR1", job),
    )
    for starts, stop in enumerate(stops, start=1):
        place.wait(lambda: place.log("long").count("goes on from step") == starts - 1, f"start {starts}")  # noqa: B023
        before = len(place.steps("long"))
        place.wait(lambda: len(place.steps("long")) > before + 6, "some steps")  # noqa: B023
        stop()
        place.wait(lambda: not workers(place, "long"), "the end of the run's process")
        place.wait(lambda: place.cluster.run("sinfo", "--noheader", "--nodes=n2", "-o", "%T") != "down", "n2")
    done = place.hybrid("logs", "-f", "long")
    assert "== stopped; queued again, 1 of 2" in done.stdout
    assert "== stopped; not queued again, that was done 2 times" in done.stdout
    assert done.returncode == 138
    assert place.status("long") == "long is stopped: after saving"


def test_a_chain_ends_when_its_run_does(place: Place) -> None:
    done = place.pretrain("short", 6, "--repeat", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the run ended in a job before this one, with exit code 0") == 2
    done = place.pretrain("broken", 6, "--repeat", "2", "data.path=/no/such/folder")
    assert done.returncode == 2
    assert "the run ended in a job before this one, with exit code 2" in done.stdout


def test_a_sweep_is_an_array_and_a_table(place: Place) -> None:
    done = place.pretrain("sweep", 6, "--sweep", "optimizer.lr=1e-3,3e-3")
    assert done.returncode == 0, done.stderr + place.logs()
    table = done.stdout[done.stdout.index("run      ") :].splitlines()
    assert table[0].split() == ["run", "optimizer.lr", "state", "step", "loss", "validation", "loss"]
    assert [line.split()[:4] for line in table[1:]] == [
        [f"sweep-{number}", lr, "finished", "6"] for number, lr in enumerate(["1e-3", "3e-3"], start=1)
    ]
    assert place.hybrid("status", "sweep").stdout.splitlines() == table
    assert place.status("sweep-2") == "sweep-2 is finished"
    assert "run folder runs/sweep-2" in place.log("sweep-2")


def test_runs_are_known_after_slurm_has_forgotten_them(
    place: Place, two: "subprocess.CompletedProcess[str]", fails: "subprocess.CompletedProcess[str]"
) -> None:
    ids = ",".join(place.jobs("two") + place.jobs("fails"))
    place.wait(lambda: not place.known(ids), "Slurm to forget (MinJobAge)")
    rows = [line.split()[:2] for line in place.hybrid("runs").stdout.splitlines()]
    assert ["fails", "failed"] in rows
    assert ["two", "finished"] in rows


@once
def test_values_of_the_environment_arrive(place: Place) -> None:
    value = 'it\'s "$HOME" `id` $(id) \\ \n é {{ x }} /nemo_run/x $$ !!'
    (place.folder / "plug.py").write_text(f"def greet(around, built):\n    around.env['greeting'] = {value!r}\n")
    interpreter = place.folder / "python"
    interpreter.write_text(f'#!/bin/bash\nprintf %s "$greeting" > {place.folder}/seen\nexec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    done = place.pretrain("env", 2, "plugins=[plug.py:greet]", f"executor.python={interpreter}")
    assert done.returncode == 0, done.stderr + place.logs()
    assert (place.folder / "seen").read_text() == value


def test_an_unknown_account_is_refused_where_there_are_accounts(place: Place) -> None:
    words = ["--detach", "executor.sbatch={hold: ''}"]
    done = place.pretrain("account", 2, *words, "executor.account=nope")
    if place.cluster.accounting:
        assert done.returncode == 1
        assert "sbatch: error: Batch job submission failed: Invalid account" in done.stderr
        done = place.pretrain("account", 2, *words, "executor.account=research")
    assert done.returncode == 0
    place.hybrid("cancel", "account")


@once
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


@once
def test_the_next_job_of_a_chain_goes_on_where_slurm_stopped_the_last(place: Place, chain_of_two: str) -> None:
    done = place.hybrid("logs", "-f", chain_of_two)
    assert len(re.findall(r"^== chain: job \d+ on ", done.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"interrupted: step \d+ is saved", done.stdout)) == 2
    assert re.search(r"goes on from step \d+", done.stdout)
    assert done.returncode == 128 + signal.SIGUSR1
    assert place.status(chain_of_two) == "chain is stopped: after saving"


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
