"""Executors by name: the kinds, a user's own profiles, overrides on the command line."""

from pathlib import Path

import pytest

from hybrid.errors import ConfigError
from recipes import profiles
from recipes.executors import Docker, Local, Slurm

OWN = """\
# Where my jobs go.
big:
  kind: slurm
  account: research
  nodes: 16
  setup: [module load cuda/13.0]
  env:
    NCCL_DEBUG: WARN
desk:
  kind: local
  devices: 2
"""


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "executors.yaml"
    path.write_text(OWN)
    monkeypatch.setenv("HYBRID_EXECUTORS", str(path))
    return path


def test_the_kinds_have_names_without_any_file(file: Path) -> None:
    file.unlink()
    assert profiles.executor("local") == Local()
    assert profiles.executor("slurm", ["executor.nodes=4"]) == Slurm(nodes=4)
    assert profiles.executor("docker") == Docker()


def test_a_profile_is_a_kind_with_values_and_overrides_come_after() -> None:
    found = profiles.executor("big", ["executor.nodes=4", "executor.env={A: b c}", "executor.mounts+=['/data']"])
    assert found == Slurm(
        account="research", nodes=4, setup=["module load cuda/13.0"], env={"A": "b c"}, mounts=["/data"]
    )
    assert profiles.executor("desk") == Local(devices=2)


def test_the_users_file_is_in_the_configuration_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYBRID_EXECUTORS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert profiles.path() == tmp_path / "hybrid-recipes" / "executors.yaml"


def test_words_of_the_executor_are_parted_from_those_of_the_recipe() -> None:
    words = ["model.hidden_size=8", "executor.nodes=2", "name=x"]
    assert profiles.split(words) == (["model.hidden_size=8", "name=x"], ["executor.nodes=2"])


def test_a_name_that_is_none_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="there is no executor 'bgi'; did you mean big"):
        profiles.executor("bgi")


def test_all_that_is_wrong_with_the_file_is_said_at_once_with_its_place(file: Path) -> None:
    file.write_text(
        "slurm:\n  kind: slurm\nbig:\n  kind: slrum\nodd:\n  kind: slurm\n  nodse: 4\n  time: [1]\nnone:\n  nodes: 4\n"
    )
    with pytest.raises(ConfigError) as error:
        profiles.profiles()
    said = str(error.value)
    for part in (
        *("slurm is a kind of executor; name it otherwise", "no kind 'slrum'; did you mean slurm"),
        *("nodse", "nodes", "time", "none: the executor has no kind"),
    ):
        assert part in said
    assert said.count(f"{file}:") >= 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["executor.nodse=4"], "did you mean nodes"),
        (["executor.nodes=four"], "executor.nodes"),
        (["executor.time=5"], None),  # sbatch's minutes
    ],
)
def test_overrides_of_an_executor_have_a_recipes_errors(words: list[str], says: str | None) -> None:
    if says is None:
        profiles.executor("slurm", words)
        return
    with pytest.raises(ConfigError, match=says):
        profiles.executor("slurm", words)


class TestOfNemoRun:
    """Any executor of nemo-run's, by a function in a file of the user's."""

    @pytest.fixture
    def function(self, tmp_path: Path, file: Path) -> str:
        path = tmp_path / "clusters.py"
        path.write_text(
            "import nemo_run\n\n\n"
            "def here(gpus: int = 1):\n"
            "    return nemo_run.LocalExecutor(ntasks_per_node=gpus, env_vars={'A': 'b'})\n\n\n"
            "def wrong():\n    return 3\n"
        )
        file.write_text(f"mine:\n  kind: {path}:here\n  gpus: 2\n")
        return f"{path}:here"

    def test_it_is_called_with_the_profiles_values(self, function: str) -> None:
        found = profiles.executor("mine")
        assert (type(found).__name__, found.ntasks_per_node) == ("LocalExecutor", 2)  # pyright: ignore
        assert profiles.executor(f"{function}(gpus=4)").ntasks_per_node == 4  # pyright: ignore

    def test_its_fields_can_be_overridden(self, function: str) -> None:
        assert profiles.executor("mine", ["executor.ntasks_per_node=8"]).ntasks_per_node == 8  # pyright: ignore
        with pytest.raises(ConfigError) as error:
            profiles.executor("mine", ["executor.ntasks_per_nod=8", "executor.env_vars+=1", "executor.retries=x"])
        assert [problem.place for problem in error.value.problems] == [
            *("executor.ntasks_per_nod", "executor.env_vars", "executor.retries")
        ]
        assert "did you mean ntasks_per_node" in str(error.value)

    def test_what_is_no_executor_is_refused(self, function: str) -> None:
        with pytest.raises(ConfigError, match="3 is no executor"):
            profiles.executor(function.replace(":here", ":wrong"))
