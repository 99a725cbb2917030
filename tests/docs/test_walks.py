"""The walks of docs/quickstart.md, docs/walk-researcher.md and docs/walk-checkpoint.md, typed as they stand.

The blocks of a page are run in order in a fresh folder: `sh` line by line, `python` written to the file that the line
before it names. Not typed is what installs (`pip install uv && uv run `, `uv sync`, `source .venv/bin/activate`): the
environment of the tests is the installed one. `docs` in the folder stands for the clone. A line that serves goes on,
once /health answers, until the end of its section; port 8000 is another one where it is taken.

Two things a reader does that no line says: the first run is stopped with Ctrl-C, as its page allows, since all of it
takes minutes; and nodes are taken from a sweep when its runs are in the midst of their steps, which are held there.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "slurm"))

import cluster as clusters

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

INSTALLS = re.compile(r"pip install uv && uv run |(?:pip install|uv sync|source) .*")
PATIENCE = 900  # seconds; far beyond what anything takes on a busy machine


@dataclass
class Line:
    """Something to do: a line of bash, or a file to write if it has a `file`."""

    section: str
    text: str
    file: str = ""


def lines(page: str) -> Iterator[Line]:
    """What a page has its reader type, in order."""
    section = named = ""
    text = (ROOT / "docs" / page).read_text()
    what = r"^## ([^\n]*)$|^`([\w.]+)`:$|^```(\w+)\n(.*?)^```$"
    for heading, name, language, block in re.findall(what, text, re.MULTILINE | re.DOTALL):
        if heading:
            section = heading
        elif name:
            named = name
        elif language == "python":
            assert named, f"{page}: no line names the file of a block of Python"
            yield Line(section, block, named)
            named = ""
        elif language == "sh":
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                if typed := INSTALLS.sub("", line, count=1):
                    yield Line(section, typed)


@dataclass
class Walk:
    """A page that is walked in a folder; `said` has what each line printed."""

    page: str
    folder: Path
    said: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    environment: dict[str, str] = field(default_factory=dict)
    before: dict[str, Callable[[], None]] = field(default_factory=dict)  # what is done before a line that begins so
    stopped: str = ""  # the line that Ctrl-C ends
    port: int = 8000

    def __post_init__(self) -> None:
        (self.folder / "docs").symlink_to(ROOT / "docs")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex(("127.0.0.1", 8000)) == 0:
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    self.port = free.getsockname()[1]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        home = {"XDG_CACHE_HOME": str(self.folder.parent / "cache"), "NEMORUN_HOME": str(self.folder / "nemo_run")}
        # The package is the one under test, wherever the environment's own lies.
        own = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HYBRID_EXECUTORS": "executors.yaml"}
        self.environment = {**os.environ, **home, **own}

    def to(self, last: str, leaving_out: str = "") -> None:
        """Type the sections up to this one that have not been typed yet."""
        all_lines = list(lines(self.page))
        order = list(dict.fromkeys(line.section for line in all_lines))
        for section in order[: order.index(last) + 1]:
            if section not in self.done and section != leaving_out:
                self.done.add(section)
                with contextlib.ExitStack() as served:
                    for line in all_lines:
                        if line.section == section:
                            self._type(line, served)

    def _type(self, line: Line, served: contextlib.ExitStack) -> None:
        if line.file:
            (self.folder / line.file).write_text(line.text)
            return
        text = line.text.replace("localhost:8000", f"localhost:{self.port}")
        for start, act in self.before.items():
            if text.startswith(start):
                act()
        if text.startswith("hybrid serve"):
            served.enter_context(self._served(text if self.port == 8000 else f"{text} --port {self.port}"))
            return
        process = self._start(text)
        if line.text == self.stopped:
            metrics = self.folder / "runs/tiny/metrics.jsonl"
            wait(lambda: metrics.is_file() and metrics.read_text().count("\n") > 30, "30 steps", process)
            os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=PATIENCE)
        self.said[line.text] = out
        assert "Traceback" not in out, f"{text}\n{out}"
        assert process.returncode == (130 if line.text == self.stopped else 0), f"{text}\n{out}"

    def _start(self, text: str) -> "subprocess.Popen[str]":
        # A terminal's Ctrl-C reaches the whole group, which exec makes one process.
        simple = text.split()[0] in ("hybrid", "python", "curl") and not re.search(r"[<>|&;]", text)
        return subprocess.Popen(
            ["bash", "-c", f"exec {text}" if simple else text],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    @contextlib.contextmanager
    def _served(self, text: str) -> Iterator[None]:
        """Serve until the end of the block; the page is read meanwhile."""
        process = self._start(text)
        try:
            wait(lambda: get(f"http://localhost:{self.port}/health"), "the server", process)
            self.said["the page"] = get(f"http://localhost:{self.port}/")
            yield
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=PATIENCE)
            assert f"is served on http://127.0.0.1:{self.port}" in out
            assert process.returncode == 0, out
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def after(self, start: str) -> str:
        """What the last line that begins like this has printed."""
        return next(out for line, out in reversed(self.said.items()) if line.startswith(start))

    def losses(self, name: str) -> dict[int, float]:
        """The losses of a run by step."""
        text = (self.folder / "runs" / name / "metrics.jsonl").read_text()
        return {line["step"]: line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line}


def wait(holds: Callable[[], object], what: str, process: "subprocess.Popen[str] | None" = None) -> None:
    """Wait until something holds, while a process runs."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        time.sleep(0.2)


def get(address: str) -> str:
    """What is served there; nothing if nobody listens."""
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def test_the_walk_of_a_newcomer(tmp_path: Path) -> None:
    walk = Walk("quickstart.md", tmp_path, stopped="hybrid pretrain tiny")
    walk.to("Look at it")
    assert "is saved; the same command goes on from there" in walk.after("hybrid pretrain tiny")
    assert walk.after("hybrid status").startswith("tiny is stopped")
    assert (tmp_path / "runs/tiny/curves.png").stat().st_size > 10_000
    assert "layer pattern  M-M*-M-M-" in walk.after("hybrid inspect")
    walk.to("Let it write")
    assert walk.after("hybrid generate").startswith("def ")
    assert walk.said["the page"].startswith("<!doctype html>")
    answer = walk.after("curl").splitlines()[-1]
    assert json.loads(answer[answer.index("{") :])["usage"]["completion_tokens"] == 20
    walk.to("Change something")
    assert "  layer_pattern           M-M*-M-M- " in walk.after("hybrid show")
    assert "done: 50 steps" in walk.after("hybrid pretrain")
    assert all(name in (tmp_path / "curves.html").read_text() for name in ("tiny", "transformer"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return Walk("walk-researcher.md", tmp_path_factory.mktemp("study"))


SWEEP = "Two patterns on a cluster"


def test_the_walk_of_a_researcher_with_a_recipe(study: Walk) -> None:
    study.to("Try it, train it")
    assert "layer_pattern           M-M*- " in study.after("hybrid show")
    assert re.search(r"hidden_size +128 => 64\n", study.after("hybrid diff"))
    assert study.after("hybrid plan").startswith("mine on 1 x h100")
    tried = next(out for line, out in study.said.items() if "name=try" in line)
    assert "ends the run within the warm-up of its recipe" in tried and "done: 3 steps" in tried
    assert "done: 300 steps" in study.after("hybrid pretrain")


@pytest.mark.slurm
def test_the_walk_of_a_researcher_on_a_cluster(study: Walk, tmp_path_factory: pytest.TempPathFactory) -> None:
    if reason := clusters.lacking():
        pytest.skip(f"no Slurm cluster: {reason}")
    study.to("Try it, train it")
    with clusters.Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        study.environment |= cluster.environment
        study.before["sbatch"] = lambda: hold_in_the_midst(study, "patterns", 2)
        study.to(SWEEP)
    for name in ("patterns-1", "patterns-2"):
        said = study.after(f"hybrid logs -f {name}")
        # The job queues itself again, or Slurm has done it before.
        assert re.search(r"interrupted: step \d+ is saved.*, start 2, .*goes on from step \d+", said, re.DOTALL), said
    table = study.after("hybrid status patterns").splitlines()
    assert [line.split()[:4] for line in table[1:]] == [
        ["patterns-1", "M-M*-", "finished", "300"],
        ["patterns-2", "M-M-M-", "finished", "300"],
    ]
    assert sum(line.endswith(" *") for line in table) == 1
    assert study.losses("patterns-1") == study.losses("mine")


def hold_in_the_midst(study: Walk, sweep: str, count: int) -> None:
    """Stop the processes of a sweep between two steps; Slurm lets them go on to the end that it asks of them."""
    for number in range(1, count + 1):
        metrics = study.folder / f"runs/{sweep}-{number}/metrics.jsonl"
        wait(lambda: metrics.is_file() and metrics.read_text(), f"the first step of run {number}")  # noqa: B023
        found = workers(f"{study.folder}/runs/{sweep}/".encode(), f"/recipe-{number}.yaml\0".encode())
        (pid,) = [pid for pid, parent in found.items() if parent not in found]  # the others load its data
        os.kill(pid, signal.SIGSTOP)
        assert metrics.read_text().count("\n") < 300, f"run {number} has ended before it could be stopped"


def workers(*marks: bytes) -> dict[int, int]:
    """The processes whose words hold all of these, with the parent of each."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes()
            if all(mark in words for mark in marks) and not words.startswith(b"srun\0"):
                found[int(path.parent.name)] = int(path.with_name("stat").read_text().rpartition(")")[2].split()[1])
    return found


def test_the_walk_of_a_researcher_to_hugging_face(study: Walk) -> None:
    study.to("Into Hugging Face's form, and loaded there", leaving_out=SWEEP)
    share = re.search(r"all: 200 asked, ([\d.]+)% in the right form", study.after("python docs/examples"))
    # There are five forms: one answer in five would have the right one by chance.
    assert share and float(share[1]) > 90, study.after("python docs/examples")
    assert "read back, and the same" in study.after("hybrid convert")
    theirs, ours = study.after("python ask.py"), study.after("hybrid generate mine_finetune --prompt")
    assert ours == "count: badge\n5 letters\n"
    assert theirs.endswith(ours)


def test_the_walk_of_an_engineer_with_a_foreign_checkpoint(tmp_path: Path) -> None:
    walk = Walk("walk-checkpoint.md", tmp_path)
    walk.to("Into another layout")
    assert "Hugging Face, nemotron_h" in walk.said["hybrid inspect theirs"]
    assert "tensor parallel 2, pipeline parallel 2" in walk.after("hybrid inspect theirs-megatron")
    for line, out in walk.said.items():
        if "--diff" in line:
            assert out == "no difference\n"
        elif "convert" in line:
            assert "read back, and the same" in out
    refused = subprocess.run(
        shlex.split("hybrid convert theirs nowhere --to megatron --tensor-parallel 4"),
        cwd=tmp_path,
        env=walk.environment,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and refused.stderr.endswith("; set --tensor-parallel to 1 or 2\n")
    walk.to("Text")
    generated = walk.after("hybrid generate theirs-megatron")
    assert generated == walk.after("hybrid generate theirs --prompt")
    served = walk.after("curl localhost:8000/v1/completions").splitlines()[-1]
    text = json.loads(served[served.index("{") :])["choices"][0]["text"]
    assert generated == f"import {text}\n"
    assert walk.said["the page"].startswith("<!doctype html>")
