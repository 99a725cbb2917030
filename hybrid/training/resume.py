"""Finding the checkpoint a run goes on from, and refusing one that cannot fit, before anything is built."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from hybrid import settings_file, weight_fields
from hybrid.config import ModelConfig, Settings
from hybrid.data.datasets import on_first_rank
from hybrid.errors import ConfigError, Problem
from hybrid.training import checksums, folder, provenance
from hybrid.training.distributed import World


def newest_whole(checkpoints: Path, world: World, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are as they were written; None if there is none at all.

    Damaged ones that are newer are renamed, and that is said. Raises ConfigError if all are damaged, and leaves them as
    they are, or if one is of a newer version.
    """
    steps = on_first_rank(lambda: folder.checkpoint_steps(checkpoints))
    problems: list[Problem] = []
    for step in reversed(steps):
        path = folder.checkpoint_folder(checkpoints, step)
        on_first_rank(lambda path=path: refuse_newer(path))
        damage = next(filter(None, world.texts(checksums.damage(path, world.rank, world.size))), "")
        if not damage:
            for problem in problems:
                aside = on_first_rank(lambda problem=problem: folder.set_aside_damaged(Path(problem.place)))
                tell(f"warning: {problem}; it is {aside.name} now, and the one before it is taken")
            return path
        problems.append(Problem(str(path), f"this checkpoint is damaged ({damage})"))
    if problems:
        way_out = f"no checkpoint before it is whole; remove '{checkpoints}' to begin anew"
        raise ConfigError([*problems, Problem(str(checkpoints), way_out)])
    return None


def refuse_newer(path: Path) -> None:
    """Raise ConfigError if a checkpoint was written by a version that this one does not know how to read."""
    try:
        versions = json.loads((path / provenance.VERSIONS_FILE).read_text())
    except (OSError, ValueError):
        return  # before there were any, or damaged, which the checksums tell
    if versions.get("format", 1) > provenance.FORMAT:
        writer = versions.get("hybrid-recipes", "a newer version")
        message = f"was written by hybrid-recipes {writer}, in a newer form than this version reads; update it"
        raise ConfigError(Problem(str(path), message))


def refuse_other_model(path: Path, settings: Settings) -> None:
    """Raise ConfigError with each field in which a checkpoint's model differs from the one that is to take it."""
    problems = list(differing_fields(settings_file.read(path).model, settings.model, str(path)))
    if problems:
        raise ConfigError(problems)


def differing_fields(saved: ModelConfig, model: ModelConfig, path: str) -> Iterator[Problem]:
    """The fields whose weights would not fit, as problems."""
    there, here = str(saved.pattern).replace("|", ""), str(model.pattern).replace("|", "")
    if there != here:
        yield Problem("model.layer_pattern", f"is '{here}', but the checkpoint '{path}' has '{there}'")
    for name, (new, old) in weight_fields.differing(model, saved).items():
        yield Problem(f"model.{name}", f"is {new!r}, but the checkpoint '{path}' has {old!r}")
    if saved.padded_vocab_size != model.padded_vocab_size:
        rows = f"{model.padded_vocab_size} rows once it is padded, but the checkpoint '{path}' has"
        yield Problem("model.vocab_size", f"is {model.vocab_size}, {rows} {saved.padded_vocab_size}")
