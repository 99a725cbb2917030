"""A Slurm cluster for the tests: without accounting, and with it.

Loading PyTorch is most of what a run costs here, and waiting for Slurm's clocks most of what is left. So both clusters
are up at once, and what a file's tests do with runs is begun with the first of them, all at the same time: see `story`.
"""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
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
# Far beyond what anything takes on a busy machine: what hangs is to be said, not what is slow.
STEPS = 100  # of a run whose losses are compared
PATIENCE = 1200  # seconds
# Commands that are under way at the same time; each loads nemo-run. Those that follow a run are not counted.
_COMMANDS = threading.BoundedSemaphore(3)

type Test = Callable[["Place"], None]


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
        self._stories: dict[Test, Future[None]] = {}

    @property
    def cluster(self) -> clusters.Cluster:
        """The cluster; a working folder on a machine without one has none."""
        assert self.of
        return self.of

    def begin(self, story: Test) -> "Future[None]":
        """Begin a story in a thread of its own, if it has not begun yet."""
        if story not in self._stories:
            future = self._stories[story] = Future()

            def tell() -> None:
                try:
                    future.set_result(story(self))
                except BaseException as error:
                    future.set_exception(error)

            threading.Thread(target=tell, name=story.__name__, daemon=True).start()
        return self._stories[story]

    def hybrid(self, *words: str, follows: bool = False) -> "subprocess.CompletedProcess[str]":
        """Run the command here; a traceback is never what a user is to see. `follows`: it ends when a run has."""
        with contextlib.nullcontext() if follows else _COMMANDS:
            done = subprocess.run(
                [sys.executable, "-m", "cli", *words],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
        # A log may hold one: when a rank is killed, the others fail where they wait for it.
        said = done.stderr if words[0] in ("logs", "status") else done.stderr + done.stdout
        assert "Traceback" not in said, said
        return done

    def pretrain(self, name: str, steps: int, *more: str) -> "subprocess.CompletedProcess[str]":
        """Train a small model on the cluster; what `more` says replaces what SMALL and ON_SLURM say."""
        said = {word.partition("=")[0] for word in more}
        usual = [word for word in (*SMALL, *ON_SLURM) if word.partition("=")[0] not in said or "=" not in word]
        words = ["pretrain", "tiny", f"name={name}", f"trainer.max_steps={steps}", *usual, *more]
        return self.hybrid(*words, follows="--detach" not in more)

    def send(self, name: str, steps: int, *more: str) -> list[str]:
        """Send a small run; returns the ids of its jobs."""
        done = self.pretrain(name, steps, "--detach", *more)
        assert done.returncode == 0, done.stderr
        return re.findall(r"\d+", done.stdout.rpartition(" is sent as ")[2])

    def wait(self, holds: Callable[[], object], what: str) -> None:
        """Wait until something holds that is quickly looked at."""
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, f"waited {PATIENCE} s for {what}:\n{self.logs()}"
            time.sleep(0.2)

    def wait_for_steps(self, name: str) -> None:
        """Wait until a run has made some more steps."""
        before = len(self.steps(name))
        self.wait(lambda: len(self.steps(name)) > before + 6, f"steps of {name}")

    def steps(self, name: str) -> list[str]:
        """The lines of a run's metrics."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        return path.read_text().splitlines() if path.is_file() else []

    def losses(self, name: str) -> dict[int, float]:
        """The losses of a run by step."""
        return {line["step"]: line["loss"] for line in map(json.loads, self.steps(name)) if "loss" in line}

    def status(self, name: str) -> str:
        """The first line of `hybrid status`."""
        return self.hybrid("status", name).stdout.splitlines()[0]

    def queue(self, *ids: str) -> list[str]:
        """The states of those of these jobs that Slurm's controller still knows."""
        try:
            return self.cluster.run("squeue", "--noheader", "--states=all", "-j", ",".join(ids), "-o", "%T").split()
        except RuntimeError:  # slurm_load_jobs error: Invalid job id specified
            return []

    def log(self, name: str) -> str:
        """What the jobs of a run have written so far."""
        paths = sorted((self.folder / "runs" / name / "logs").glob(f"{name}_*.out"))
        return "\n".join(path.read_text() for path in paths)

    def logs(self) -> str:
        """The ends of what the jobs of all runs have written, for whoever reads why a test failed."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("runs/*/logs/*_*.out")))


WITHOUT, WITH = "without accounting", "with accounting"
# What accounting has nothing to do with is run once.
once = pytest.mark.parametrize("place", [WITHOUT], indirect=True)


def story(test: Test) -> Test:
    """A test that waits for runs most of its time: it is begun with the file's first test, and awaited in its turn."""

    @functools.wraps(test)
    def told(place: Place) -> None:
        place.begin(test).result()

    vars(told)["story"] = test
    return told


@pytest.fixture(scope="session")
def place_on(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Callable[[str], Place]]:
    """The working folder on a cluster, which is started when it is first asked for."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def on(name: str) -> Place:
            cluster = clusters.Cluster(tmp_path_factory.mktemp("cluster"), accounting=name == WITH)
            folder = tmp_path_factory.mktemp("place")
            (folder / "cache").symlink_to(shared_cache)
            return Place(stack.enter_context(cluster), folder)

        yield on


@pytest.fixture(scope="session", params=[WITHOUT, WITH])
def place(request: pytest.FixtureRequest, place_on: Callable[[str], Place]) -> Place:
    """One working folder for all runs on a cluster."""
    if reason := clusters.lacking(accounting=request.param == WITH):
        pytest.skip(f"no Slurm cluster {request.param}: {reason}")
    return place_on(request.param)


@pytest.fixture(scope="module", autouse=True)
def stories(request: pytest.FixtureRequest, place_on: Callable[[str], Place]) -> None:
    """Begin the stories among a file's tests that were asked for, on every cluster that can be had."""
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.module is request.module and hasattr(item.function, "story"):
            name = item.callspec.params["place"]
            if not clusters.lacking(accounting=name == WITH):
                place_on(name).begin(item.function.story)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def losses_here(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> dict[int, float]:
    """Losses of the recipe over two processes of this machine."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "cache").symlink_to(shared_cache)
    here = Place(None, folder)
    words = ["pretrain", "tiny", "name=here", f"trainer.max_steps={STEPS}", *SMALL, "parallel.tensor=2"]
    done = here.hybrid(*words, follows=True)
    assert done.returncode == 0, done.stderr
    return here.losses("here")
