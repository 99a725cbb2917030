"""Where a run keeps its files, and how a checkpoint is found from what a user says. Imports no torch.

runs/NAME/job.json             how it was started (recipes/records.py)
runs/NAME/settings.json        what is run
runs/NAME/starts.jsonl         one line a start: versions, machine, git
runs/NAME/metrics.jsonl        one line a step
runs/NAME/log.txt              what was said, and why it failed
runs/NAME/hung_rank0.txt       where the threads of a rank stood that made no progress any more
runs/NAME/checkpoints/latest_checkpointed_iteration.txt
runs/NAME/checkpoints/iter_0000100/   torch_dist, with settings.json, versions.json, checksums.json, tokenizer/
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybrid import atomic, settings_file
from hybrid.config import CheckpointConfig, Settings
from hybrid.errors import ConfigError, Problem, nearest, unwritable
from hybrid.settings_file import FILE_NAME as SETTINGS_FILE

JOB_FILE = "job.json"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"
CHECKPOINTS = "checkpoints"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
TOKENIZER = "tokenizer"
# What a folder is called that is being written or removed.
UNFINISHED = ".saving-"

# What may change between two starts of one run; anything else makes it another run.
_MAY_CHANGE = (
    "name",  # its folder was renamed, or copied
    "folder",
    "plugins",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.expert",
    "parallel.sequence",
    "parallel.overlap_",
    "checkpoint.",
    "data.cache",
    "data.num_workers",
    "model.kernels",
    "optimizer.warmup_",  # as long as the run is, so that a trial run can go on as the whole one
    "trainer.max_",
    "trainer.micro_batch_size",
    "trainer.eval_",
    "trainer.log_",
    "trainer.profile",
    "trainer.memory_snapshot",
    "faults.",
    "trainer.recompute",
)

_MOST_FIELDS = 5  # that are named of those in which two runs differ

_STEP = re.compile(r"iter_(\d{7,})")


@contextmanager
def writable(run: Path) -> Iterator[None]:
    """Turn what the system says to a write into a run's folder into one sentence. Raises as `unwritable` says."""
    try:
        yield
    except OSError as error:
        raise unwritable(run, "the run's folder cannot be written", error) from None


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """The folder of one step's checkpoint; Megatron's own naming."""
    return checkpoints / f"iter_{step:07d}"


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Steps of which there is a finished checkpoint, oldest first. A save in progress has another name."""
    if not checkpoints.is_dir():
        return []
    matches = [_STEP.fullmatch(path.name) for path in checkpoints.iterdir()]
    return sorted(int(match[1]) for match in matches if match)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's folder."""
    match = _STEP.fullmatch(checkpoint.name)
    assert match
    return int(match[1])


def latest_step(checkpoints: Path) -> int | None:
    """The newest finished checkpoint's step."""
    return max(checkpoint_steps(checkpoints), default=None)


def finished(settings: Settings, step: int | None) -> str:
    """What is said of a run whose newest checkpoint is of its last step; '' if there is something left to do."""
    if step is None or step < settings.trainer.steps:
        return ""
    other = "; name=... starts another run from checkpoint.load" if settings.checkpoint.load else ""
    return f"finished: step {step} of {settings.trainer.steps} is done; raise trainer.max_steps to go on{other}"


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what a save or a removal that was cut off left behind."""
    for path in checkpoints.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside_old(checkpoints: Path, keep: CheckpointConfig) -> list[Path]:
    """Rename all but the newest `keep.keep_last` and each `keep.keep_every`th step's checkpoint, for removal.

    Renamed first, one whose removal is cut off is not taken for a checkpoint. Returns what is to be removed.
    """
    if not keep.keep_last:
        return []
    old = checkpoint_steps(checkpoints)[: -keep.keep_last]
    if keep.keep_every:
        old = [step for step in old if step % keep.keep_every]
    paths = [checkpoint_folder(checkpoints, step) for step in old]
    return [path.rename(checkpoints / f"{UNFINISHED}old-{path.name}") for path in paths]


def begun_with(run: Path) -> Settings | None:
    """The settings of the run in a folder, None if it has no checkpoint yet: then it can be another run as well."""
    step = latest_step(run / CHECKPOINTS)
    if step is None:
        return None
    places = (run, checkpoint_folder(run / CHECKPOINTS, step))
    return next((settings_file.read(place) for place in places if (place / SETTINGS_FILE).is_file()), None)


def set_aside_damaged(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is not taken for one, nor kept in the place of a whole one.

    Raises UserError if the run's folder cannot be written.
    """
    checkpoints, aside = checkpoint.parent, checkpoint.with_name(f"{checkpoint.name}.damaged")
    with writable(checkpoints.parent):
        if aside.exists():
            shutil.rmtree(aside)
        checkpoint.rename(aside)
        atomic.write_text(checkpoints / TRACKER_FILE, str(latest_step(checkpoints)))
    return aside


def refuse_other_run(settings: Settings) -> None:
    """Raise ConfigError if the run's folder holds checkpoints of a run with other settings.

    It names each field that differs, or of many a few, of all sections.
    """
    run = Path(settings.folder) / settings.name
    if (before := begun_with(run)) is None:
        return
    changed = {
        field: (old, new)
        for field, (old, new) in settings_file.differences(before, settings).items()
        if not field.startswith(_MAY_CHANGE) and not _cut_otherwise(field, old, new)
    }
    way_out = "name this run otherwise (name=...)"
    if len(changed) > _MOST_FIELDS:
        firsts = {field.partition(".")[0]: field for field in reversed(changed)}.values()
        shown = [*reversed(firsts), *(field for field in changed if field not in firsts)][:_MOST_FIELDS]
        message = f"the run in '{run}' is another one: {len(changed)} settings differ, among them these; {way_out}"
        problems = [Problem("name", message)]
        problems += [Problem(field, f"is {changed[field][1]!r}, there {changed[field][0]!r}") for field in shown]
    else:
        problems = [
            Problem(field, f"is {new!r}, but the run in '{run}' has {old!r}; {way_out}")
            for field, (old, new) in changed.items()
        ]
    if problems:
        raise ConfigError(problems)


def _cut_otherwise(field: str, old: object, new: object) -> bool:
    """Whether two layer patterns are the same layers, on other pipeline stages."""
    return field == "model.layer_pattern" and str(old).replace("|", "") == str(new).replace("|", "")


def foreign_format(path: Path) -> str:
    """What a folder with a checkpoint of another format holds, in words; empty if it is none that is known."""
    if (path / "config.json").is_file() and (any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))):
        return "a Hugging Face checkpoint"
    if any(path.glob("mp_rank_*/model_optim_rng.pt")) or any(path.glob("*/mp_rank_*/model_optim_rng.pt")):
        return "a checkpoint of Megatron's legacy format"
    if any(path.glob("*.distcp")) or any(path.glob("iter_*/*.distcp")):
        return "a torch_dist checkpoint without the settings of a run of ours"
    return ""


def _own(path: Path, reference: str) -> Path:
    """Return `path`. Raises ConfigError if it holds a checkpoint of another format."""
    if not (path / SETTINGS_FILE).is_file() and (kind := foreign_format(path)):
        way_out = f"`hybrid convert {reference} NEW_FOLDER --to torch_dist` makes one that a run can start from"
        raise ConfigError(Problem(reference, f"is {kind}; {way_out}"))
    return path


def find_checkpoint(reference: str, runs: str = "runs") -> Path:
    """The checkpoint folder that a run's name, a run's folder or a checkpoint's folder means: the newest of several.

    Raises ConfigError, with the runs there are, if there is none.
    """
    for base in (Path(reference), Path(runs) / reference):
        for checkpoints in (base / CHECKPOINTS, base):
            step = latest_step(checkpoints)
            if step is not None:
                return _own(checkpoint_folder(checkpoints, step), reference)
        if (base / "metadata.json").is_file() and (base / SETTINGS_FILE).is_file():
            return base
        _own(base, reference)
    # A run that is queued, or has just been started, has no settings yet.
    places = (Path(reference), Path(runs) / reference)
    if any((place / name).is_file() for place in places for name in (SETTINGS_FILE, JOB_FILE)):
        first = "the first comes after checkpoint.save_interval steps, or when it is interrupted"
        again = "if it does not run any more, the same `hybrid pretrain` goes on"
        raise ConfigError(Problem(reference, f"this run has no finished checkpoint yet; {first}; {again}"))
    begun = {path.parent.name for name in (SETTINGS_FILE, JOB_FILE) for path in Path(runs).glob(f"*/{name}")}
    there = sorted(begun | {path.parent.parent.name for path in Path(runs).glob(f"*/{CHECKPOINTS}/{TRACKER_FILE}")})
    names = f"runs here: {', '.join(there)}" if there else f"there are no runs in '{runs}' here"
    hint = nearest(reference, there) or ";"
    raise ConfigError(Problem(reference, f"is neither a run nor a checkpoint folder{hint} {names}"))
