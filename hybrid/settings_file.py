"""The settings of a run as a JSON file, beside the run and inside each of its checkpoints."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

from hybrid import atomic, fields
from hybrid.config import Settings
from hybrid.errors import ConfigError, Problem, nearest

FILE_NAME = "settings.json"


def to_dict(settings: Settings) -> dict[str, Any]:
    """Plain dictionaries, lists, strings and numbers."""
    return dataclasses.asdict(settings)


def from_dict(values: Any, place: str) -> Settings:
    """Settings from what `to_dict` gave. A field that is not there takes its default.

    Raises ConfigError naming `place` for each field this version does not know, and each value of a wrong type.
    """
    if not isinstance(values, dict):
        raise ConfigError(Problem(place, f"holds a {type(values).__name__}, not the settings of a run"))
    sections = get_type_hints(Settings)
    problems = [
        Problem(place, f"lacks '{field.name}', which has no default")
        for field in dataclasses.fields(Settings)
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in sections:
            problems.append(Problem(place, f"unknown section {name!r}{nearest(name, sections)}"))
        elif dataclasses.is_dataclass(sections[name]):
            if not isinstance(value, dict):
                problems.append(Problem(place, f"the section '{name}' is {value!r:.40}, not an object of fields"))
                continue
            known = {field.name for field in dataclasses.fields(sections[name])}
            problems += [
                Problem(place, f"unknown field '{name}.{key}'{nearest(key, known)}; written by a newer version?")
                for key in value
                if key not in known
            ]
            arguments[name] = sections[name](**{key: value[key] for key in value if key in known})
        else:
            arguments[name] = value
    if not problems:
        settings = Settings(**arguments)
        wrong = fields.wrong_types(settings)
        if not wrong:
            return settings
        problems = [dataclasses.replace(problem, place=f"{place}: {problem.place}") for problem in wrong]
    raise ConfigError(problems)


def write(settings: Settings, folder: Path) -> None:
    """Write `settings.json` into a folder that exists. Raises OSError."""
    atomic.write_text(folder / FILE_NAME, json.dumps(to_dict(settings), indent=1) + "\n")


def read(folder: Path) -> Settings:
    """Read `settings.json` of a run's folder or a checkpoint's. Raises ConfigError if it is not there or damaged."""
    path = folder / FILE_NAME
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            Problem(str(path), "there is no such file, so this is no run or checkpoint of ours")
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(str(path), f"cannot be read: {error}")) from None
    return from_dict(values, str(path))


def differences(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, by dotted name: (old value, new value)."""
    found = {}
    before, after = to_dict(old), to_dict(new)
    for section, value in after.items():
        if isinstance(value, dict):
            for key, entry in value.items():
                if before[section].get(key) != entry:
                    found[f"{section}.{key}"] = (before[section].get(key), entry)
        elif before.get(section) != value:
            found[section] = (before.get(section), value)
    return found
