"""Many prompts from a file of JSON lines to a file of JSON lines."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from hybrid.errors import ConfigError, Problem, UserError
from hybrid.generation.generator import Generator
from hybrid.generation.sampling import Sampling, settings_of
from hybrid.generation.text import is_whole


@dataclass(frozen=True)
class Request:
    """A prompt with its settings; `place` is the file and line that it came from."""

    place: str
    prompt: str | list[int]
    sampling: Sampling


def check(prompt: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for an empty prompt and settings that make no sense, all of it at once."""
    problems = [] if prompt else [Problem("prompt", "is empty; give the text to go on from")]
    try:
        Sampling(**settings)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)


def read_text(path: Path, place: str) -> str:
    """A file's text, or stdin's ("-"), with its line ends as they are. Raises ConfigError if that is not to be had."""
    try:
        content = _stdin() if str(path) == "-" else path.read_bytes()
        return content.decode() if isinstance(content, bytes) else content
    except (OSError, UnicodeDecodeError) as error:
        named = "stdin" if str(path) == "-" else f"'{path}'"
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(Problem(place, f"{named} cannot be read: {reason}")) from None


def _stdin() -> bytes | str:
    """As bytes where it has any: its text has been through the locale's encoding, and its line ends are others."""
    binary = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if binary is None else binary.read()


def read(path: Path, settings: Mapping[str, Any]) -> list[Request]:
    """Read lines such as {"prompt": "def ", "seed": 1}; what a line does not say is as in `settings`.

    Raises ConfigError with everything that is wrong, by line.
    """
    lines = read_text(path, "--batch").split("\n")  # not splitlines: JSON may hold U+2028 and the like
    requests, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            requests.append(Request(f"{path}:{number}", *_request(line, settings)))
        except ConfigError as error:
            problems += _at(f"{path}:{number}", error)
    if not requests and not problems:
        problems.append(Problem("--batch", f"'{path}' has no lines"))
    if problems:
        raise ConfigError(problems)
    return requests


def _at(place: str, error: ConfigError) -> list[Problem]:
    return [Problem(f"{place} {each.place}".rstrip(), each.message) for each in error.problems]


def _request(line: str, settings: Mapping[str, Any]) -> tuple[str | list[int], Sampling]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(Problem("", f"is no JSON: {error}")) from None
    if not isinstance(values, dict):
        raise ConfigError(Problem("", 'is no object such as {"prompt": "def "}'))
    prompt = values.pop("prompt", None)
    problems = []
    if not prompt or not (isinstance(prompt, str) or _are_tokens(prompt)):
        problems.append(Problem("prompt", "must be a text or a list of tokens, and not empty"))
    elif isinstance(prompt, str) and not is_whole(prompt):
        problems.append(Problem("prompt", "holds half of a character, which is no text in UTF-8"))
    try:
        sampling = settings_of({**settings, **values})
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return prompt, sampling


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def refuse_output(output: Path | None) -> None:
    """Raise ConfigError if the output cannot be written to."""
    if output is None:
        return
    target = _target(output)
    if not target.parent.is_dir():
        raise ConfigError(Problem("--output", f"'{output}' is in a folder that does not exist"))
    if target.is_dir():
        raise ConfigError(Problem("--output", f"'{output}' is a folder"))
    if target.exists() and not target.is_file():
        message = f"'{output}' is no regular file; leave --output out and redirect stdout"
        raise ConfigError(Problem("--output", message))
    if target.exists() and target.stat().st_size:
        raise ConfigError(Problem("--output", f"'{output}' is there already; remove it, or name another file"))
    if not os.access(target.parent, os.W_OK):
        raise ConfigError(Problem("--output", f"'{output}' is in a folder that may not be written to"))


def _target(output: Path) -> Path:
    """What is to be written: a link stays, and what it leads to is replaced."""
    return Path(os.path.realpath(output))


def run(
    model: Generator, requests: list[Request], output: Path | None, report: Callable[[str], None] | None = None
) -> None:
    """Write a line for each request, in their order, as they get finished; the file appears when it is complete."""
    encoded, problems = [], []
    for request in requests:
        try:
            encoded.append((model.encode(request.prompt), request.sampling))
            model.engine.check(*encoded[-1])
        except ConfigError as error:
            problems += _at(request.place, error)
    if problems:
        raise ConfigError(problems)
    started, tokens, written = time.monotonic(), 0, 0
    finished: dict[int, str] = {}
    with _writing(output) as file:
        for done, (index, text) in enumerate(model.run(encoded), 1):
            request = requests[index]
            scored = request.sampling.logprobs is not None
            tokens += len(text.tokens) - (text.prompt_tokens if request.sampling.echo and scored else 0)
            result = {"prompt": request.prompt, "text": text.text, "finish_reason": text.reason}
            if scored:
                result["tokens"] = [vars(token) for token in text.tokens]
            finished[index] = json.dumps(result, ensure_ascii=False)
            while written in finished:
                file.write(finished.pop(written) + "\n")
                written += 1
            if report:
                speed = tokens / max(time.monotonic() - started, 1e-9)
                report(f"{done} of {len(requests)}, {tokens:,} tokens, {speed:,.0f} tokens/s")


@contextmanager
def _writing(output: Path | None) -> Any:
    """stdout, or a file beside `output` that takes its place at the end."""
    if output is None:
        yield sys.stdout
        return
    target = _target(output)
    part = target.with_name(f".{target.name}.part")
    try:
        file: TextIO
        with part.open("w", encoding="utf-8") as file:
            yield file
        os.replace(part, target)
    except OSError as error:
        raise UserError(f"{output} was not written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
