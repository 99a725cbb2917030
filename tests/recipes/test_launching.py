"""Starting recipes: what is printed, what is refused, what is remembered of a run on this machine."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid import atomic, settings_file
from hybrid.errors import ConfigError, UserError
from recipes import apply, hybrid_8b, launch, local, processes, records, settings, slurm, sweeps, tiny, watching
from recipes.executors import Local, seconds
from recipes.files import read_recipe
from recipes.settle import settle

SMALL = ["model.hidden_size=32", "trainer.global_batch_size=8", "trainer.micro_batch_size=2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "HYBRID_JOB"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def problems(error: pytest.ExceptionInfo[ConfigError]) -> dict[str, str]:
    return {problem.place: problem.message for problem in error.value.problems}


def test_a_dry_run_prints_a_command_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = apply(tiny(), [*SMALL, "plugins=[triton_cache(/tmp/t)]"])
    assert launch(recipe, local(2, env={"GREETING": "it's me"}), dry_run=True) == 0
    said = capsys.readouterr()
    assert said.err == "note: what this reads is written into runs/tiny by a start; now nothing is\n"
    words = shlex.split(said.out)
    assert words[:3] == ["TRITON_CACHE_DIR=/tmp/t", "GREETING=it's me", sys.executable]
    assert words[3:] == [
        *("-m", "recipes.torchrun", "runs/tiny/logs", "--standalone", "--nproc-per-node", "2"),
        *("-m", "recipes.worker", "runs/tiny/recipe.yaml"),
    ]
    assert list(here.iterdir()) == []


def test_all_that_is_wrong_with_recipe_and_executor_is_said_at_once() -> None:
    recipe = apply(tiny(), ["trainer.global_batch_size=7"])
    with pytest.raises(ConfigError) as error:
        launch(recipe, slurm(time="soon", nodes=0, env={"1x": ""}, mounts=["/x"], gpu="h1000"), dry_run=True)
    assert set(problems(error)) == {
        *("executor.time", "executor.nodes", "executor.env", "executor.mounts", "executor.gpu")
    }
    with pytest.raises(ConfigError) as error:
        launch(recipe, slurm(time="soon", container="registry.example#team/pytorch", mounts=["/usr"]), dry_run=True)
    found = set(problems(error)) - {"executor"}  # sbatch may be lacking
    assert found == {"executor.time", "trainer.global_batch_size", "folder"}
    assert "add executor.mounts+=" in problems(error)["folder"]


def test_this_machine_is_no_login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/sbin:/bin")
    monkeypatch.setattr("recipes.records.shell", records.shell)
    with pytest.raises(ConfigError) as error:
        launch(tiny(), slurm(container="/no/image.sqsh", mounts=["/no/folder", os.getcwd()]))
    found = problems(error)
    assert found["executor.mounts"] == "there is no '/no/folder' on this machine"
    assert found["executor.container"] == "there is no image '/no/image.sqsh' on this machine"


def test_ssh_that_is_refused_is_said_in_its_own_words() -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1: .*Connection refused"):
        launch(tiny(), slurm(ssh="127.0.0.1:1"))


@pytest.mark.parametrize("text", ["a/../../b", "x y", "tiny\n", "100%"])
def test_names_that_a_slurm_job_cannot_have_are_refused(text: str) -> None:
    recipe = tiny()
    recipe.folder = f"runs/{text}" if "/" not in text else "runs"
    recipe.name = "tiny" if "/" not in text else text
    with pytest.raises(ConfigError):
        launch(recipe, slurm(), dry_run=True)


def test_what_a_job_runs_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """nemo-run's jobs import the user's script again, and one without a main guard submits itself for ever."""
    monkeypatch.setenv("HYBRID_JOB", "tiny_1")
    with pytest.raises(ConfigError, match="main guard"):
        launch(tiny())


def test_made_up_data_needs_a_tokenizer_as_soon_as_it_is_no_dry_run() -> None:
    recipe = apply(hybrid_8b(), ["data.source=mock"])
    assert launch(recipe, dry_run=True) == 0
    with pytest.raises(ConfigError, match=r"data\.tokenizer: there is no tokenizer '.*': use 'byte'"):
        launch(recipe)


def test_a_mistake_is_said_before_that_the_name_is_another_runs(here: Path) -> None:
    run = here / "runs" / "tiny"
    (run / "checkpoints" / "iter_0000001").mkdir(parents=True)
    settings_file.write(settings(tiny()), run)
    with pytest.raises(ConfigError) as error:
        launch(apply(tiny(), ["data.source=text"]))
    assert list(problems(error)) == ["data.path", "data.source"]
    with pytest.raises(ConfigError) as error:
        launch(apply(hybrid_8b(), ["name=tiny"]))
    (path, _), (name, says), *fields = problems(error).items()
    assert (path, name) == ("data.path", "name")
    assert says.startswith("the run in 'runs/tiny' is another one: 20 settings differ, among them these; name this run")
    assert [field for field, _ in fields[:4]] == [
        *("model.layer_pattern", "data.source", "optimizer.lr", "trainer.precision")
    ]
    assert len(fields) == 5


def test_slurm_that_does_not_answer_is_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = here / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/bash\necho 'sbatch: error: one' >&2\necho 'sbatch: fatal: two' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("sys.stdin", io.StringIO())  # nemo-run reads it
    with pytest.raises(ConfigError) as error:
        launch(tiny(), slurm())
    says = "the job was not sent (sbatch: error: one; sbatch: fatal: two); `sinfo` says what Slurm on this machine has"
    assert str(error.value) == f"executor: {says}, or that it does not answer"
    assert not (here / "runs" / "tiny").exists()


def test_a_chain_is_for_slurm() -> None:
    with pytest.raises(ConfigError, match="chains jobs of a Slurm cluster"):
        launch(tiny(), repeat=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:00", 5400),
        ("2-12", 60 * 3600),
        ("2-12:30", 60 * 3600 + 1800),
        ("1-00:00:01", 86401),
        ("soon", None),
        ("1:2:3:4", None),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, expected: int | None) -> None:
    assert seconds(text) == expected


class TestWhatAStartLeaves:
    """What runs is replaced."""

    def refuse(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[], object] = lambda: None) -> None:
        def run(_: object) -> None:
            before()
            raise ConfigError("the data are of another kind")

        monkeypatch.setattr("recipes.weights.run", run)
        with pytest.raises(ConfigError, match="of another kind"):
            launch(tiny(), local(1))

    def test_one_that_is_refused_before_its_first_step_leaves_no_run(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.refuse(monkeypatch, (here / "runs" / "tiny" / "metrics.jsonl").touch)
        assert not list(here.iterdir())
        monkeypatch.setattr(processes, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit(2)"])
        (here / "runs").mkdir()
        assert launch(apply(tiny(), ["trainer.micro_batch_size=4"]), local(2)) == 2
        assert not list((here / "runs").iterdir())

    def test_what_was_there_before_and_what_has_steps_stays(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = here / "runs" / "tiny"
        self.refuse(monkeypatch, lambda: (run / "metrics.jsonl").write_text('{"step": 1}\n'))
        assert watching.state(run).status == "failed"
        self.refuse(monkeypatch, (run / "metrics.jsonl").unlink)
        assert watching.state(run).status == "failed"

    def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"trainer\.log_to: wandb is not installed here"):
            launch(apply(tiny(), ["trainer.log_to=[wandb]"]))
        assert not list(here.iterdir())

    def test_a_finished_run_is_known_without_loading_anything(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        started: list[object] = []
        monkeypatch.setattr("recipes.weights.run", started.append)
        checkpoint = here / "runs" / "tiny" / "checkpoints" / "iter_0000500"
        assert launch(tiny(), local(1)) == 0
        checkpoint.mkdir(parents=True)
        settings_file.write(settings(tiny()), here / "runs" / "tiny")
        assert launch(tiny(), local(1)) == 0
        said = capsys.readouterr().out
        assert said == "finished: step 500 of 500 is done; raise trainer.max_steps to go on\n"
        assert len(started) == 1
        launch(apply(tiny(), ["trainer.max_steps=501"]), local(1))
        (checkpoint / "checksums.json").write_text("not JSON")  # the start itself says what becomes of a damaged one
        launch(tiny(), local(1))
        assert len(started) == 3


class TestRunsOnThisMachine:
    """A stand-in for a run: processes that a record tells of."""

    def start(self, here: Path, script: str) -> Path:
        run = here / "runs" / "toy"
        run.mkdir(parents=True)
        processes._detach([sys.executable, "-c", script], dict(os.environ), run)
        return run

    def ended(self, run: Path) -> watching.State:
        for _ in range(200):
            if (state := watching.state(run)).status != "running":
                return state
            time.sleep(0.05)
        raise AssertionError("it did not end")

    def test_a_run_that_ends_well(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = self.start(here, "print('hello')")
        assert watching.follow(run) == 0
        assert capsys.readouterr().out.endswith("hello\n")
        assert (self.ended(run).status, watching.log(run)) == ("finished", "hello\n")

    def test_a_run_that_fails_leaves_its_code_and_last_lines(self, here: Path) -> None:
        run = self.start(here, "print('a\\nrank 0 failed:\\nwhy'); raise SystemExit(3)")
        state = self.ended(run)
        assert (state.status, state.code, state.detail) == ("failed", 3, "exit code 3")
        assert state.last_lines == ["rank 0 failed:", "why"]
        assert watching.follow(run) == 3

    def test_a_run_that_is_cancelled(self, here: Path) -> None:
        run = self.start(here, "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(143))\ntime.sleep(60)")
        time.sleep(0.5)
        with pytest.raises(ConfigError, match="is running"):
            launch(apply(tiny(), ["name=toy"]))
        assert "saves and stops" in watching.cancel(run)
        assert (self.ended(run).status, self.ended(run).detail) == (
            "stopped",
            "goes on with the same command",
        )
        with pytest.raises(ConfigError, match=r"toy is not running: stopped .*; there is nothing to cancel"):
            watching.cancel(run)

    def test_a_run_that_has_ended_is_not_running_though_its_process_is(self, here: Path) -> None:
        """A notebook starts a run, and then makes it longer."""
        run = here / "runs" / "toy"
        run.mkdir(parents=True)
        processes._remember(run, os.getpid(), log="log.txt")
        with pytest.raises(ConfigError, match="the run 'toy' is running"):
            watching.refuse_under_way(run)
        with processes._noting_the_end(run) as ended:
            ended.code = 0
        assert watching.state(run).status == "finished"
        watching.refuse_under_way(run)

    def test_of_two_that_start_it_at_once_one_is_refused(self, here: Path) -> None:
        """The second has looked whether it is under way before the first had written that it is."""
        script = (
            "import sys, time; from pathlib import Path; from recipes import processes as p; run = Path('runs/toy')\n"
        )
        script += (
            "with p._starting(run): print(1, flush=True); time.sleep(1); p._remember(run, p.os.getpid(), 'log.txt')\n"
        )
        (here / "runs" / "toy").mkdir(parents=True)
        path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        first = subprocess.Popen([sys.executable, "-c", script + "time.sleep(60)"], stdout=subprocess.PIPE, env=path)
        assert first.stdout is not None and first.stdout.readline() == b"1\n"
        with pytest.raises(ConfigError, match="the run 'toy' is running"), processes._starting(here / "runs" / "toy"):
            pass
        first.kill()
        first.wait()

    def test_a_run_that_is_killed(self, here: Path) -> None:
        run = self.start(here, "import time; time.sleep(60)")
        record = records.read(run)
        assert record and record.process
        os.killpg(record.process[0], signal.SIGKILL)
        assert "gone without a word" in self.ended(run).detail

    def test_the_id_of_a_process_is_not_enough(self, here: Path) -> None:
        run = self.start(here, "pass")
        self.ended(run)
        (run / "logs" / "exit_local").unlink()
        record = records.read(run)
        assert record
        record.process = (os.getpid(), 1)
        records.write(record, run)
        assert watching.state(run).status == "failed"

    def test_a_run_that_was_moved_or_copied_is_where_it_is_now(self, here: Path) -> None:
        run = self.start(here, "print('hello')")
        self.ended(run)
        copied = shutil.copytree(run, here / "elsewhere" / "copy")
        (copied / "metrics.jsonl").write_text('{"step": 3, "loss": 2.5}\n')
        shutil.move(run, here / "elsewhere" / "toy")
        for folder in (copied, here / "elsewhere" / "toy"):
            state = watching.state(folder)
            assert (state.name, state.status, watching.log(folder)) == (folder.name, "finished", "hello\n")
        assert watching.state(copied).step == 3

    def test_the_newest_validation_is_found_however_long_ago_it_was(self, here: Path) -> None:
        run = self.start(here, "pass")
        self.ended(run)
        lines = [{"step": step, "loss": 3.0, "bits_per_byte": 4.3} for step in range(1, 2001)]
        lines.insert(250, {"step": 250, "validation_loss": 1.6, "validation_bits_per_byte": 2.3})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        recorded = watching.state(run)
        (run / records.FILE_NAME).unlink()
        (run / "settings.json").write_text("{}")
        for state in (recorded, watching.state(run)):
            assert (state.step, state.loss, state.validation) == (2000, 3.0, {"validation": 1.6})
            assert state.bits_per_byte == {"validation": 2.3}

    def test_an_exit_code_that_is_being_written_is_none_yet(self, here: Path) -> None:
        run = self.start(here, "pass")
        self.ended(run)
        (run / "logs" / "exit_local").write_text("")
        assert "gone without a word" in watching.state(run).detail

    def test_who_cancels_too_late_or_without_the_right_is_told(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = self.start(here, "import time; time.sleep(60)")
        for error, says in ((ProcessLookupError, "toy has just ended"), (PermissionError, "is another user's")):
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpgid", lambda _, error=error: (_ for _ in ()).throw(error))
                with pytest.raises(ConfigError, match=says):
                    watching.cancel(run)
        watching.cancel(run)

    def test_a_disk_that_is_full_does_not_hide_what_ended_the_run(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (here / "toy").mkdir()

        def full(path: Path, text: str) -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(UserError, match="not saved"), processes._noting_the_end(here / "toy"):
            monkeypatch.setattr(atomic, "write_text", full)
            raise UserError("this checkpoint was not saved")


def test_a_name_that_is_no_run_is_answered_with_those_there_are(here: Path) -> None:
    (here / "runs" / "small").mkdir(parents=True)
    (here / "runs" / "small" / "settings.json").write_text("{}")
    with pytest.raises(ConfigError) as error:
        records.find("smal")
    assert "did you mean small?" in str(error.value)
    assert records.find("small") == Path("runs/small")
    assert watching.state(Path("runs/small")).status == "unknown"


def test_the_recipe_that_is_started_is_in_the_folder_of_the_run(here: Path) -> None:
    from recipes.staging import write_recipe

    recipe = settle(apply(tiny(), ["trainer.max_steps=3"]))
    write_recipe(recipe, here / "runs" / "tiny")
    longer = settle(apply(tiny(), ["trainer.max_steps=5"]))
    write_recipe(longer, here / "runs" / "tiny")
    assert read_recipe(here / "runs" / "tiny" / "recipe.yaml") == longer


class TestSweeps:
    def test_values_parted_by_commas_are_combined(self) -> None:
        points = sweeps.expand(["model.layer_pattern=M-,M*", "optimizer.lr=1e-3, 2e-3", "data.split=[98,1,1]"])
        assert [list(point.values.values()) for point in points] == [
            ["M-", "1e-3"],
            ["M-", "2e-3"],
            ["M*", "1e-3"],
            ["M*", "2e-3"],
        ]
        assert points[3].arguments == ["model.layer_pattern=M*", "optimizer.lr=2e-3", "data.split=[98,1,1]"]

    @pytest.mark.parametrize("arguments", [[], ["optimizer.lr=1e-3"], ["optimizer.lr=1,,2"], ["name='a,b'"]])
    def test_nothing_to_sweep_over_is_refused(self, arguments: list[str]) -> None:
        with pytest.raises(ConfigError):
            sweeps.expand(arguments)

    def test_each_run_is_checked_before_any_starts(self) -> None:
        points = sweeps.expand(["trainer.global_batch_size=8", "trainer.micro_batch_size=3,2,5"])
        with pytest.raises(ConfigError) as error:
            sweeps.launch_sweep(points, lambda words: apply(tiny(), words), Local(devices=1))
        assert list(problems(error)) == ["tiny-1: trainer.global_batch_size", "tiny-3: trainer.global_batch_size"]

    def test_the_best_is_the_best_of_those_that_can_be_compared(self) -> None:
        rows = [
            sweeps.Row("a-1", {"lr": "1"}, "finished", 6, 2.9, {"validation": 3.1}),
            sweeps.Row("a-2", {"lr": "2"}, "stopped", 3, 2.0),  # before its validation
            sweeps.Row("a-3", {"lr": "3"}, "finished", 6, None, {"validation": None}),  # not a number
        ]
        starred = [line for line in sweeps.table(rows).splitlines() if line.endswith("*")]
        assert [line.split()[0] for line in starred] == ["a-1"]
        assert "*" not in sweeps.table(rows[2:])

    def test_values_that_would_make_the_same_run_twice_are_refused(self) -> None:
        with pytest.raises(ConfigError) as error:
            sweeps.expand(["optimizer.lr*=2,3", "optimizer.lr*=5,7", "trainer.max_steps=2,2", "name=a,b"])
        assert problems(error) == {
            "optimizer.lr": "is swept twice; name all its values in one override",
            "trainer.max_steps": "names a value twice",
            "name": "is that of the whole sweep, whose runs get numbers; give one",
        }

    def test_the_table_marks_the_best(self) -> None:
        rows = [
            sweeps.Row("a-1", {"lr": "1"}, "finished", 6, 2.0, {"validation": 3.0}),
            sweeps.Row("a-2", {"lr": "2"}, "finished", 6, 2.5, {"validation": 2.5}),
            sweeps.Row("a-3", {"lr": "3"}, "queued"),
        ]
        assert sweeps.table(rows).splitlines() == [
            "run  lr  state     step  loss    validation loss",
            "a-1  1   finished  6     2.0000  3.0000",
            "a-2  2   finished  6     2.5000  2.5000 *",
            "a-3  3   queued",
        ]

    @pytest.mark.parametrize("content", ["", "{}x", '[{"run": 3}]', "7"])
    def test_a_damaged_list_of_runs_is_said(self, here: Path, content: str) -> None:
        (here / "sweep.json").write_text(content)
        for ask in (sweeps.rows, sweeps.follow, sweeps.under_way):
            with pytest.raises(ConfigError, match=r"sweep.json: cannot be read as the runs of a sweep"):
                ask(here)

    def test_a_dry_run_prints_each(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        points = sweeps.expand([*SMALL, "optimizer.lr=1e-3,2e-3"])
        assert sweeps.launch_sweep(points, lambda words: apply(tiny(), words), Local(devices=1), dry_run=True) == 0
        out = capsys.readouterr().out.splitlines()
        assert [line.rpartition(" ")[2] for line in out] == ["runs/tiny-1/recipe.yaml", "runs/tiny-2/recipe.yaml"]
        assert list(here.iterdir()) == []

    def test_a_sweep_and_a_run_of_one_name_would_hide_each_other(self, here: Path) -> None:
        points, recipe_of = sweeps.expand(["optimizer.lr=1e-3,2e-3"]), lambda words: apply(tiny(), words)
        (here / "runs/tiny").mkdir(parents=True)
        (here / "runs/tiny/settings.json").write_text("{}")
        with pytest.raises(ConfigError, match="there is a run 'tiny', which the sweep's table would hide"):
            sweeps.launch_sweep(points, recipe_of, Local(devices=1))
        (here / "runs/tiny/settings.json").rename(here / "runs/tiny/sweep.json")
        with pytest.raises(ConfigError, match="'tiny' is what a sweep is called"):
            launch(tiny())


def test_versions_that_differ_from_where_it_was_sent_are_named(tmp_path: Path) -> None:
    from hybrid.training import provenance
    from recipes import worker

    here = provenance.versions()
    path = tmp_path / worker.VERSIONS_FILE
    path.write_text(json.dumps({**here, "torch": "1.0", "mamba-ssm": "9"}))
    assert list(worker.differing_versions(path)) == [
        f"torch is {here['torch']} here, and 1.0 where this run was sent from",
        "mamba-ssm is none here, and 9 where this run was sent from",
    ]


def test_what_is_sent_is_the_code_as_it_stands(tmp_path: Path) -> None:
    """nemo-run's packager leaves out what is not committed; here git is not asked."""
    from recipes import staging

    staging.stage(tmp_path, [settle(tiny())])
    assert read_recipe(tmp_path / "recipe.yaml") == settle(tiny())
    own = Path(staging.__file__)
    assert (tmp_path / "code" / "recipes" / own.name).read_bytes() == own.read_bytes()
    environment = {"PYTHONPATH": str(tmp_path / "code"), "PYTHONSAFEPATH": "1"}
    program = "import hybrid.config, recipes; print(hybrid.config.__file__, recipes.__file__)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert all(path.startswith(str(tmp_path / "code")) for path in done.stdout.split())


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """Here by a limit on the size of files, which some of the code's exceed."""
    script = f"from recipes import staging; staging.stage(__import__('pathlib').Path({str(tmp_path)!r}), [])"
    words = ["bash", "-c", f'ulimit -f 4; exec "{sys.executable}" -c "$0"', script]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1].endswith(f"{tmp_path}: what is to be sent cannot be written: File too large")
