"""A cluster that is reached by SSH: a real server on this machine, in front of the test cluster."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sshd
from conftest import Place, once

pytestmark = [pytest.mark.slurm, pytest.mark.slow, once]


@dataclass
class Elsewhere:
    """A working folder on a machine from which the cluster is reached by SSH alone."""

    place: Place
    home: Path  # of the user on the cluster
    server: sshd.Server
    words: list[str]


@pytest.fixture(scope="module")
def elsewhere(place: Place, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    if reason := sshd.lacking():
        pytest.skip(f"no SSH server: {reason}")
    folder = tmp_path_factory.mktemp("elsewhere")
    home = folder / "home"
    home.mkdir()
    (home / "cache").symlink_to(shared_cache)
    (folder / "laptop").mkdir()
    with sshd.serve(folder / "ssh", place.cluster.environment) as server:
        laptop = Place(None, folder / "laptop")
        laptop.environment |= {"PATH": f"{server.programs}:{laptop.environment['PATH']}"}
        laptop.environment |= {"SLURM_CONF": "/no/such/file"}
        words = [f"executor.ssh={server.address}", f"executor.identity={server.identity}"]
        words += [f"executor.folder={home}", f"executor.python={sys.executable}"]
        yield Elsewhere(laptop, home, server, words)


def test_a_run_over_ssh_is_followed_to_its_end(elsewhere: Elsewhere) -> None:
    done = elsewhere.place.pretrain("far", 6, *elsewhere.words)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "done: 6 steps" in done.stdout
    # What it leaves is on the cluster; here is what finds it again.
    assert (elsewhere.home / "runs" / "far" / "checkpoints").is_dir()
    assert not (elsewhere.place.folder / "runs" / "far" / "checkpoints").exists()
    said = elsewhere.place.hybrid("status", "far").stdout.splitlines()
    assert said[0] == "far is finished"
    assert re.match(r"step 6/6, loss \d", said[1])
    assert elsewhere.place.hybrid("logs", "far").stdout == done.stdout.partition("\n")[2]


def test_a_job_over_ssh_can_be_cancelled(elsewhere: Elsewhere) -> None:
    (job,) = elsewhere.place.send("held", 6, *elsewhere.words, "executor.sbatch={hold: ''}")
    assert elsewhere.place.status("held").startswith("held is queued")
    assert f"job {job} is cancelled" in elsewhere.place.hybrid("cancel", "held").stdout
    assert elsewhere.place.status("held") == "held is cancelled"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["executor.identity=/no/such/key"], "executor.identity: there is no file '/no/such/key' on this machine"),
        (["executor.identity={folder}/host_key"], "Permission denied"),
        (["executor.folder=/no/such/folder"], "executor.folder: there is no folder '/no/such/folder'"),
        (["executor.python=/no/python"], "executor.python: '/no/python' on "),
        (["executor.partition=nope"], "sbatch: error: invalid partition specified: nope"),
    ],
)
def test_what_is_refused_over_ssh_is_said(elsewhere: Elsewhere, words: list[str], says: str) -> None:
    words = [word.format(folder=elsewhere.server.identity.parent) for word in words]
    changed = {word.partition("=")[0] for word in words}
    usual = [word for word in elsewhere.words if word.partition("=")[0] not in changed]
    done = elsewhere.place.pretrain("refused", 6, "--detach", *usual, *words)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert not (elsewhere.home / "runs" / "refused").exists()
    assert not (elsewhere.place.folder / "runs" / "refused").exists()
