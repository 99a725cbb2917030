"""What a user did wrong, said in the user's own terms."""

import difflib
import errno
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    `place` names the field, file or argument as the user wrote it (`model.num_layers`), `message` is one sentence
    that says what is wrong there and the way out. `detail` is an optional second line, kept as it is: a caret under a
    symbol, the sequence of valid names.
    """

    place: str
    message: str
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.place}: {self.message}" if self.place else self.message
        return f"{text}\n{self.detail}" if self.detail else text


class UserError(Exception):
    """Something the user can mend; the command prints it without a traceback and ends with `exit_code`."""

    exit_code = 1


class ConfigError(UserError):
    """A usage or configuration error: every problem found, not only the first one."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem] | Problem | str):
        if isinstance(problems, str):
            problems = Problem("", problems)
        if isinstance(problems, Problem):
            problems = [problems]
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class CheckpointError(UserError):
    """Files of a checkpoint that are missing, damaged, or hold what is not read."""

    exit_code = 2


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # the place is right, and there is no room, or it broke
_MOST_NAMES = 30  # that a message lists


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return '; did you mean X?' if one of `valid` is near to `name`, else ''."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def names(name: str, valid: Iterable[str], listed: str = "hybrid show tiny") -> str:
    """The line of valid names under a problem with `name`; of very many those near to it, and the verb with all."""
    every = list(valid)
    if len(every) <= _MOST_NAMES:
        return f"valid names: {', '.join(every)}"
    near = difflib.get_close_matches(name, every, n=5, cutoff=0.5)
    return f"{f'near to it: {", ".join(near)}; ' if near else ''}`{listed}` shows all {len(every)}"


def unwritable(path: object, what: str, error: OSError, way_out: str = "") -> UserError:
    """What is to be raised where a write into `path` failed: a ConfigError if it names a place that takes none.

    `what` is the sentence that the system's words end: 'the folder cannot be written'.
    """
    message = f"{what}: {error.strerror or error}{f'; {way_out}' if way_out else ''}"
    if error.errno in _FULL:
        return UserError(f"{path}: {message}")
    return ConfigError(Problem(str(path), message))
