"""A Slurm cluster for the tests: without accounting, and with it."""

import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cluster as clusters

ROOT = Path(__file__).parent.parent.parent
# A recipe that trains in seconds, on CPU cores that exist on paper only.
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
    "checkpoint.save_interval=100000",
    "data.source=text",
    f"data.path={Path(sysconfig.get_paths()['stdlib']) / 'email'}",
    "data.cache=cache",
]
ON_SLURM = ["--executor", "slurm", "executor.gpu_request=none", "executor.time=30"]


class Place:
    """A working folder on the login node of a cluster."""

    def __init__(self, cluster: clusters.Cluster | None, folder: Path):
        self.of, self.folder = cluster, folder
        self.environment = {
            **os.environ,
            **(cluster.environment if cluster else {}),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HYBRID_EXECUTORS": str(folder / "executors.yaml"),
            # nemo-run's notes of its own are the user's; these are the test's.
            "NEMORUN_HOME": str(folder / "nemo_run_home"),
        }

    @property
    def cluster(self) -> clusters.Cluster:
        """The cluster; a working folder on a machine without one has none."""
        assert self.of
        return self.of

    def hybrid(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run the command here; a traceback is never what a user is to see."""
        done = subprocess.run(
            [sys.executable, "-m", "cli", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        # A log may hold one: when a rank is killed, the others fail where they wait for it.
        said = done.stderr if words[0] in ("logs", "status") else done.stderr + done.stdout
        assert "Traceback" not in said, said
        return done

    def losses(self, name: str) -> dict[int, float]:
        """The losses of a run by step."""
        return {line["step"]: line["loss"] for line in map(json.loads, self.steps(name)) if "loss" in line}

    def pretrain(self, name: str, steps: int, *more: str) -> "subprocess.CompletedProcess[str]":
        """Train a small model on the cluster; what `more` says replaces what SMALL and ON_SLURM say."""
        said = {word.partition("=")[0] for word in more}
        usual = [word for word in (*SMALL, *ON_SLURM) if word.partition("=")[0] not in said or "=" not in word]
        return self.hybrid("pretrain", "tiny", f"name={name}", f"trainer.max_steps={steps}", *usual, *more)

    def send(self, name: str, steps: int, *more: str) -> str:
        """Send a small run; returns the id of its job."""
        done = self.pretrain(name, steps, "--detach", *more)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def wait(self, holds: Callable[[], object], what: str, seconds: float = 600) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}:\n{self.logs()}"
            time.sleep(0.2)

    def steps(self, name: str) -> list[str]:
        """The lines of a run's metrics."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        return path.read_text().splitlines() if path.is_file() else []

    def status(self, name: str) -> str:
        """The first line of `hybrid status`."""
        return self.hybrid("status", name).stdout.splitlines()[0]

    def log(self, name: str) -> str:
        """What the jobs of a run have written."""
        return self.hybrid("logs", name).stdout

    def jobs(self, name: str) -> list[str]:
        """Slurm's ids of a run's jobs."""
        return json.loads((self.folder / "runs" / name / "job.json").read_text())["ids"]

    def known(self, ids: str) -> bool:
        """Whether Slurm's controller still knows one of these jobs."""
        try:
            return bool(self.cluster.run("squeue", "--noheader", "--states=all", "-j", ids))
        except RuntimeError:  # slurm_load_jobs error: Invalid job id specified
            return False

    def logs(self) -> str:
        """What the jobs have written, for whoever reads why a test failed."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("runs/*/logs/*_*.out")))


WITHOUT, WITH = "without accounting", "with accounting"


@pytest.fixture(scope="session", params=[WITHOUT, WITH])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[clusters.Cluster]:
    accounting = request.param == WITH
    if reason := clusters.lacking(accounting=accounting):
        pytest.skip(f"no Slurm cluster {request.param}: {reason}")
    with clusters.Cluster(tmp_path_factory.mktemp("cluster"), accounting=accounting) as running:
        yield running


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def place(cluster: clusters.Cluster, tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Place:
    """One working folder for all runs on a cluster: jobs of one test run beside those of the next."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "cache").symlink_to(shared_cache)
    return Place(cluster, folder)
