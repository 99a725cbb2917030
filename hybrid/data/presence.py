"""Whether the files that `data.*` names are there: looked at where a run is started, before anything heavy is loaded.

What is in them is checked when they are read.
"""

from collections.abc import Callable
from functools import partial

from hybrid.config import DataConfig
from hybrid.data.corpus import folder_of
from hybrid.data.indexed import files_of
from hybrid.data.inputs import example_files
from hybrid.data.sources import parse_blend
from hybrid.data.tokenizer import tokenizer_path
from hybrid.errors import ConfigError, Problem


def absent(data: DataConfig) -> list[Problem]:
    """What of it is missing, or of another kind than `data.source` reads."""
    given = {"data.path": data.path, "data.validation_path": data.validation_path, "data.test_path": data.test_path}
    problems: list[Problem] = []
    for place, value in given.items():
        try:
            looks = _looks(data.source, value, place) if value else []
        except ConfigError as error:
            problems += error.problems
            continue
        for look in looks:
            try:
                look()
            except ConfigError as error:
                problems += error.problems
    return problems


def tokenizer_absent(data: DataConfig) -> list[Problem]:
    """What is wrong if the file or folder of the tokenizer is missing."""
    try:
        if data.tokenizer != "byte":
            tokenizer_path(data.tokenizer)
    except ConfigError as error:
        return error.problems
    return []


def _looks(source: str, value: str, place: str) -> list[Callable[[], object]]:
    """What to call, each of which raises ConfigError for what is missing; raises one itself for what cannot be read."""
    if source == "text":
        return [partial(folder_of, value)]
    if source == "sft":
        return [partial(example_files, value, place)]
    if source == "indexed":
        return [partial(files_of, prefix, place) for _, prefix in parse_blend(value, place)]
    return []
