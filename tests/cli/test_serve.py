"""What `hybrid serve` says before it loads a model."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.main import run


def refused(*arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        run(["serve", *arguments])
    assert end.value.code == 2


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_a_name_that_there_is_not_is_said_before_a_port_that_is_taken(
    taken: int, capsys: pytest.CaptureFixture[str]
) -> None:
    refused("tiyn", "--port", str(taken))
    assert "tiyn: is neither a run nor a checkpoint" in capsys.readouterr().err


def test_an_address_that_cannot_be_had_is_a_mistake_in_the_command(
    taken: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is said before the model is looked at: an empty folder is none."""
    refused(str(tmp_path), "--port", str(taken))
    assert f"--port: 127.0.0.1 port {taken} cannot be listened on" in capsys.readouterr().err
    refused(str(tmp_path), "--host", "no.such.host.invalid")
    assert "--host: no.such.host.invalid port 8000 cannot be listened on" in capsys.readouterr().err
