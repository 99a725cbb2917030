"""nemo-run's own executor objects."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid.errors import ConfigError, UserError
from recipes import apply, launch, tiny
from recipes.executors import Local, Slurm

nemo_run = pytest.importorskip("nemo_run")

from recipes import foreign  # noqa: E402

ROOT = Path(__file__).parent.parent.parent


def test_a_slurm_executor_is_taken_as_ours_of_the_same_values() -> None:
    theirs = nemo_run.SlurmExecutor(
        account="research",
        partition="main",
        time="04:00:00",
        nodes=2,
        ntasks_per_node=8,
        gpus_per_node=8,
        cpus_per_task=4,
        mem="100G",
        exclusive=True,
        signal="TERM@60",
        retries=3,
        comment="a b",
        container_image="img",
        container_mounts=["/a:/b"],
        env_vars={"A": "b"},
        srun_args=["--mpi=pmix"],
        setup_lines="module load a\nmodule load b",
        additional_parameters={"mail-user": "me", "wait": True},
        tunnel=nemo_run.SSHTunnel(host="login", user="me", port=2222, job_dir="/home/me", identity="~/.ssh/key"),
    )
    assert foreign.ours(theirs) == Slurm(
        account="research",
        partition="main",
        time="04:00:00",
        nodes=2,
        devices=8,
        cpus=4,
        memory="100G",
        exclusive=True,
        warning=60,
        requeues=3,
        container="img",
        mounts=["/a:/b"],
        env={"A": "b"},
        srun=["--mpi=pmix"],
        setup=["module load a", "module load b"],
        sbatch={"comment": "a b", "mail-user": "me", "wait": ""},
        ssh="me@login:2222",
        identity="~/.ssh/key",
        folder="/home/me",
    )
    assert foreign.ours(nemo_run.SlurmExecutor(account="x")) == Slurm(
        account="x", devices=1, gpu_request="none", time="00:10:00"
    )


def test_a_field_without_a_counterpart_is_refused_and_not_dropped() -> None:
    theirs = nemo_run.SlurmExecutor(account="x", heterogeneous=True, memory_measure=True)
    with pytest.raises(ConfigError) as error:
        foreign.ours(theirs)
    assert {problem.place for problem in error.value.problems} == {"executor.heterogeneous", "executor.memory_measure"}


def test_a_local_executor_is_this_machine() -> None:
    assert foreign.ours(nemo_run.LocalExecutor(ntasks_per_node=2, env_vars={"A": "b"})) == Local(
        devices=2, env={"A": "b"}
    )


def test_any_other_is_started_by_nemo_run_and_its_refusal_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nemo-run logs that a job was not started, and says nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    theirs = nemo_run.DockerExecutor(container_image="img", packager=nemo_run.Packager())
    assert foreign.ours(theirs) is None
    with pytest.raises(UserError, match="nemo-run's DockerExecutor did not start the run"):
        launch(apply(tiny(), ["model.hidden_size=32"]), theirs)


@pytest.mark.slow
def test_nemo_run_takes_a_recipe_by_hand(tmp_path: Path) -> None:
    """With the main guard that it needs: the job imports the script again."""
    small = [
        *("model.layer_pattern=M-M*-", "model.hidden_size=32", "model.mamba_state_dim=16", "model.mamba_head_dim=16"),
        *("data.sequence_length=64", "trainer.global_batch_size=4", "trainer.micro_batch_size=2", "data.source=mock"),
        *("optimizer.warmup_samples=1", "trainer.eval_interval=0", "trainer.eval_steps=1", "trainer.max_steps=2"),
    ]
    (tmp_path / "mine.py").write_text(
        "import nemo_run\nfrom recipes import apply, tiny, to_nemo_run\n\n"
        f"if __name__ == '__main__':\n    recipe = apply(tiny(), {small!r})\n"
        "    nemo_run.run(to_nemo_run(recipe), executor=nemo_run.LocalExecutor(), name='by_hand')\n"
    )
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    environment |= {"NEMORUN_HOME": str(tmp_path / "home"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
