"""The settings beside a run: whole at any moment, and read with the place of whatever is wrong in them."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid import atomic, settings_file
from hybrid.config import ModelConfig, Settings
from hybrid.errors import ConfigError

SETTINGS = Settings(name="a", model=ModelConfig(layer_pattern="M-"))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    settings_file.write(SETTINGS, tmp_path)
    assert settings_file.read(tmp_path) == SETTINGS
    assert [path.name for path in tmp_path.iterdir()] == [settings_file.FILE_NAME]


def test_a_field_that_is_not_there_takes_its_default() -> None:
    assert settings_file.from_dict({"name": "a", "model": {"layer_pattern": "M-"}}, "here") == SETTINGS


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_file.write(SETTINGS, tmp_path)

    def full(self: Path, text: str, **_: Any) -> None:
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_text(tmp_path / settings_file.FILE_NAME, "other")
    assert settings_file.read(tmp_path) == SETTINGS


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "cannot be read"),
        ("[1]", "holds a list, not the settings of a run"),
        ("{}", "lacks 'name', which has no default\n.*lacks 'model'"),
        ('{"name": "a", "model": {}, "trainer": 3}', "the section 'trainer' is 3, not an object of fields"),
        ('{"name": "a", "model": {}, "trainr": {}}', "unknown section 'trainr'; did you mean trainer"),
        ('{"name": "a", "model": {"hiden_size": 3}}', "unknown field 'model.hiden_size'; did you mean hidden_size"),
        ('{"name": "a", "model": {"layer_pattern": 3}}', "model.layer_pattern: is 3, but must be a text or None"),
    ],
)
def test_damage_is_said_with_its_place(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / settings_file.FILE_NAME).write_text(content)
    with pytest.raises(ConfigError, match=says) as error:
        settings_file.read(tmp_path)
    assert all(str(tmp_path) in problem.place for problem in error.value.problems)


def test_every_setting_survives_json() -> None:
    assert settings_file.from_dict(json.loads(json.dumps(settings_file.to_dict(SETTINGS))), "here") == SETTINGS
