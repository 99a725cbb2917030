"""Runs in a container on this machine: the command that starts one, and what is refused."""

import shlex
from pathlib import Path

import pytest

from hybrid.errors import ConfigError
from recipes import apply, docker, launch, tiny

SMALL = ["model.hidden_size=32", "trainer.global_batch_size=8", "trainer.micro_batch_size=2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "HYBRID_JOB"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def program(here: Path) -> str:
    """A program in the place of docker's, which has no image and notes how it was called."""
    path = here / "docker"
    says = '[ $1 = info ] && exit 0\necho "no such image" >&2\nexit 1\n'
    path.write_text(f'#!/bin/bash\necho "$*" >> {here}/calls\n{says}')
    path.chmod(0o755)
    return str(path)


def test_a_dry_run_prints_the_command_and_writes_nothing(
    here: Path, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "data").mkdir()
    executor = docker(
        "img", devices=2, command=program, mounts=[f"{here}/data"], options=["--shm-size=8g"], env={"A": "it's $HOME"}
    )
    assert launch(apply(tiny(), [*SMALL, "plugins=[nsys]", "name=my run"]), executor, dry_run=True) == 0
    words = shlex.split(capsys.readouterr().out)
    assert any(word.startswith("--name=hybrid-my-run-") for word in words)  # docker knows no spaces
    assert words[:4] == ["A=it's $HOME", program, "run", "--detach"]
    image = words.index("img")
    # The image's own entry point would take what follows for words of the `hybrid` command.
    assert "--entrypoint=nsys" in words[:image]
    assert {f"--volume={here}:{here}", f"--volume={here}/data:{here}/data", "--shm-size=8g", "--env=A"} <= set(words)
    assert words[image + 1] == "profile"
    rest = words[words.index("python3") :]
    assert rest[:4] == ["python3", "-u", "-m", "recipes.torchrun"]
    assert rest[-3:-1] == ["-m", "recipes.worker"]
    assert sorted(path.name for path in here.iterdir()) == ["data", "docker"]


def test_an_image_that_is_not_there_is_said_and_nothing_is_left(here: Path, program: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no image 'img' here \(no such image\)"):
        launch(apply(tiny(), SMALL), docker("img", command=program, devices=1))
    assert "image inspect" in (here / "calls").read_text()
    assert not (here / "runs").exists()


def test_a_daemon_that_does_not_answer_is_told_from_an_image_that_is_not_there(here: Path, program: str) -> None:
    Path(program).write_text('#!/bin/bash\necho "Cannot connect. Is it running?" >&2\nexit 1\n')
    says = r"executor\.command: '.*' does not answer \(Cannot connect\. Is it running\?\); start its daemon, or see"
    with pytest.raises(ConfigError, match=says):
        launch(apply(tiny(), SMALL), docker("img", command=program, devices=1))


def test_what_cannot_be_is_refused_at_once(here: Path) -> None:
    with pytest.raises(ConfigError) as error:
        launch(apply(tiny(), SMALL), docker(command="dokcer", mounts=["data", "/no/such"], devices=1))
    said = [str(problem) for problem in error.value.problems]
    assert "'dokcer' is not installed here" in said[0]
    assert "'data' is not HOST:CONTAINER" in said[1]
    assert "there is no '/no/such' here" in said[2]


def test_a_file_is_looked_for_where_container_and_machine_share_their_paths(
    here: Path, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "data").mkdir()
    elsewhere = docker("img", command=program, mounts=[f"{here}/data:/mnt/data", "/usr"], devices=1)

    def start(*fields: str) -> list[str]:
        try:
            launch(apply(tiny(), [*SMALL, "data.source=text", *fields]), elsewhere, dry_run=True)
        except ConfigError as error:
            return [problem.place for problem in error.problems]
        return []

    assert start("data.path=/mnt/data/texts", "data.tokenizer=/opt/of-the-image.model") == []
    assert start("data.path=texts", "data.tokenizer=/usr/no-such.model") == ["data.path", "data.tokenizer"]
