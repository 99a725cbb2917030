"""megatron-core's datasets over prepared or indexed data, and the batches a training loop takes from them.

Training samples come from megatron-core's `GPTDataset` (documents end to end, cut into sequences, shuffled, repeated as
often as the run needs); held-out data is read by `HeldOut`, which gives every token once.

A sample is a dict: tokens, labels, position_ids (sequence_length,) int64, loss_mask (sequence_length,) float32. A batch
has a micro-batch dimension in front.
"""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import normalize
from torch.utils.data import DataLoader, Dataset

from hybrid.config import Settings
from hybrid.data import sft
from hybrid.data.cache import adopt, cache_folder, clear_errors, remove_litter, unfinished_name
from hybrid.data.sources import Part, find_sources
from hybrid.data.tokenizer import Tokenizer
from hybrid.errors import ConfigError, Problem, UserError

Sample = dict[str, torch.Tensor]


@dataclass
class Datasets:
    """What a run reads. `fingerprint` changes when the tokens do, so a resumed run can tell that its data changed.

    `notes` are what its owner should know of it.
    """

    train: Dataset
    validation: dict[str, Dataset] = field(default_factory=dict)
    test: dict[str, Dataset] = field(default_factory=dict)
    fingerprint: str = ""
    notes: list[str] = field(default_factory=list)


class HeldOut(Dataset):
    """All tokens of some documents in sequences, each token a label exactly once (the very first has no context).

    Unlike GPTDataset it neither shuffles, nor repeats, nor drops the end: the last sequence is filled up with masked
    positions. With `samples` below the number of sequences, that many are taken at even distances.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, filler: int, samples: int | None = None):
        """`tokens` (N,) may be a memory map; `filler` is a token to put where the loss is masked."""
        self._tokens, self._length, self._filler = tokens, sequence_length, filler
        self._sequences = -(-(len(tokens) - 1) // sequence_length)
        self._samples = self._sequences if samples is None else min(samples, self._sequences)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int | None) -> Sample:
        """Return a sample; for None one that is masked throughout, to fill up a batch."""
        sequence = 0 if index is None else index * self._sequences // self._samples
        start = sequence * self._length
        text = torch.from_numpy(self._tokens[start : start + self._length + 1].astype(np.int64))
        labelled = 0 if index is None else len(text) - 1
        text = torch.nn.functional.pad(text, (0, self._length + 1 - len(text)), value=self._filler)
        positions = torch.arange(self._length)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": (positions < labelled).float(),
            "position_ids": positions,
        }


def build_datasets(
    settings: Settings, tokenizer: Tokenizer, *, train_samples: int, validation_samples: int | None = None
) -> Datasets:
    """Prepare the data where needed and return the run's datasets.

    Every rank calls this; rank 0 prepares and indexes while the others wait, and an error there is raised on all. Works
    without torch.distributed, too. `train_samples` is the length of the run, `validation_samples` the most that one
    validation takes of a set (None: all of it).

    Raises ConfigError when data is missing, damaged, too small for one sample, or has tokens that the embedding has no
    row for; UserError when the cache cannot be written or is not shared by all ranks.
    """
    check_vocabulary(settings, tokenizer)
    _check_helpers()
    data = settings.data
    if data.source == "mock":
        return _mock(settings, tokenizer, train_samples, validation_samples)
    if data.source == "sft":
        return _fine_tuning(settings, tokenizer, train_samples, validation_samples)
    sources = on_first_rank(lambda: find_sources(data, tokenizer, settings.model.padded_vocab_size))
    facts = [sources.fingerprint, [part.prefix for part in sources.train], tokenizer.unique_identifiers]
    facts += [data.sequence_length, settings.trainer.seed, train_samples]
    final = cache_folder(data) / "indices" / _digest(facts)
    surplus = on_first_rank(lambda: _surplus([part.weight for part in sources.train], train_samples))
    config = _training_config(settings, tokenizer, sources.train, surplus)
    train = _with_index_cache(config, final, train_samples)

    def held_out(parts: list[Part]) -> dict[str, Dataset]:
        return {p.name: HeldOut(p.read(), data.sequence_length, tokenizer.eod, validation_samples) for p in parts}

    return Datasets(train, held_out(sources.validation), held_out(sources.test), sources.fingerprint)


def check_vocabulary(settings: Settings, tokenizer: Tokenizer) -> None:
    """Raise ConfigError when the tokenizer has ids that the embedding has no row for."""
    rows = settings.model.padded_vocab_size
    if tokenizer.vocab_size > rows:
        message = (
            f"the embedding has {rows} rows, but the tokenizer '{tokenizer.spec}' has {tokenizer.vocab_size} tokens; "
            f"set model.vocab_size={tokenizer.vocab_size}"
        )
        raise ConfigError(Problem("model.vocab_size", message))


def _check_helpers() -> None:
    """Raise UserError when megatron-core lacks its compiled part; a wheel brings it, a build without a compiler not."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        message = (
            f"megatron-core lacks datasets.helpers_cpp for Python {version}: install a wheel of it, or a C++ compiler"
        )
        raise UserError(f"{message} and then megatron-core again")


def batches(
    dataset: Dataset,
    *,
    consumed_samples: int = 0,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    num_workers: int = 0,
    fill_up: bool = False,
) -> DataLoader:
    """Return the micro-batches of one data parallel rank, from a sample of the run on.

    The order depends on nothing but the dataset: micro-batch k of rank r takes the samples from `consumed_samples` +
    (k * data_parallel_size + r) * micro_batch_size on, so a run can stop anywhere and go on with another number of
    ranks. A last set of micro-batches that is not full on every rank is dropped, or with `fill_up` (for held-out data)
    filled with samples whose loss is masked. `len` of the result is the number of micro-batches.

    `num_workers` processes load ahead; they are forked at the first batch and neither they nor the loader touch torch's
    random state, which a resumed run needs to find as it was.
    """
    sampler = _Order(len(dataset), consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size, fill_up)  # pyright: ignore[reportArgumentType]
    return DataLoader(
        dataset,
        batch_sampler=sampler,  # pyright: ignore[reportArgumentType]: None stands for a masked sample
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_leave_signals_to_the_parent if num_workers else None,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )


@dataclass(frozen=True)
class _Order:
    """The sample indices of one rank, a micro-batch at a time; None stands for a masked sample."""

    samples: int
    consumed: int
    micro_batch_size: int
    rank: int
    ranks: int
    fill_up: bool

    def __len__(self) -> int:
        left, step = max(0, self.samples - self.consumed), self.micro_batch_size * self.ranks
        return -(-left // step) if self.fill_up else left // step

    def __iter__(self) -> Iterator[list[int | None]]:
        for k in range(len(self)):
            start = self.consumed + (k * self.ranks + self.rank) * self.micro_batch_size
            yield [i if i < self.samples else None for i in range(start, start + self.micro_batch_size)]


def _leave_signals_to_the_parent(worker: int) -> None:
    """Let a worker outlive Ctrl-C and Slurm's warning, which reach every process of a job.

    Only the training process acts on them: it still needs its data while it saves. A SIGTERM that comes from it, as at
    its end, does end the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.set_num_threads(1)
    if not hasattr(signal, "sigwaitinfo"):
        return  # not Linux: SIGTERM keeps its usual meaning
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def end_with_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()


def on_first_rank[T](work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and return its outcome on every rank; raise its UserError on every rank."""
    if not torch.distributed.is_initialized():
        return work()
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _config(settings: Settings, tokenizer: Tokenizer, **blend: Any) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=settings.trainer.seed,
        sequence_length=settings.data.sequence_length,
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]: only the attributes named in Tokenizer are read
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **blend,
    )


def _surplus(weights: list[float], samples: int) -> float:
    """How many more samples than its share megatron-core must index of each dataset of a blend, as a fraction.

    Its blending overshoots a dataset's share by a few samples, and where that is more than its fixed 0.5% (small
    shares, many datasets) it gives up with an IndexError. Here the blending is done once to see by how much.
    """
    if len(weights) == 1:
        return 0.0
    from megatron.core.datasets import helpers_cpp  # pyright: ignore[reportAttributeAccessIssue]: compiled

    shares = np.array(normalize(weights))
    targets = np.ceil(samples * shares).astype(np.int64)
    total = int(targets.sum())
    dataset, position = np.zeros(total, np.int16), np.zeros(total, np.int64)
    helpers_cpp.build_blending_indices(dataset, position, shares, len(shares), total, False)
    # One more than was drawn, for a tie that rounding might decide otherwise.
    drawn = np.bincount(dataset, minlength=len(shares)) + 1
    return max(0.005, float((drawn / targets).max()) - 1)


def _training_config(settings: Settings, tokenizer: Tokenizer, parts: list[Part], surplus: float) -> GPTDatasetConfig:
    single = len(parts) == 1
    blend = ([part.prefix for part in parts], None if single else [part.weight for part in parts])
    config = _config(settings, tokenizer, blend=blend, split="1", mid_level_dataset_surplus=surplus)
    # Set here because the builder would otherwise build an index for each split, and never end for an empty one.
    config.split_matrix = [parts[0].share, None, None]  # pyright: ignore[reportAttributeAccessIssue]
    return config


def _with_index_cache(config: GPTDatasetConfig, final: Path, train_samples: int) -> Dataset:
    """Build the training dataset with its indices in the folder `final`, which is either complete or not there.

    megatron-core names its index files by path and settings alone and takes any file of that name for a whole one; so
    the folder's name holds a digest of the tokens, and what is built goes to a folder beside that is renamed at the end
    (the maps stay open).
    """

    def choose() -> Path:
        with clear_errors(final.parent, "choose another folder with data.cache"):
            final.parent.mkdir(parents=True, exist_ok=True)
            remove_litter(final.parent)
        return final if final.is_dir() else unfinished_name(final)

    folder = on_first_rank(choose)
    config.path_to_cache = str(folder)
    try:
        with clear_errors(final.parent, "choose another folder with data.cache"):
            train = _build(GPTDataset, [train_samples, 0, 0], config)[0]
    except FileNotFoundError as error:
        message = f"'{error.filename}' is not there on rank {_rank()}: data.cache must be a folder that all nodes share"
        raise UserError(message) from error
    except BaseException:
        if _rank() == 0 and folder != final:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if _rank() == 0 and folder != final:
        adopt(folder, final)
    return train


def _build(cls: type[GPTDataset], sizes: list[int], config: GPTDatasetConfig) -> list[Any]:
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        return BlendedMegatronDatasetBuilder(cls, sizes, lambda: True, config).build()
    except Exception as error:
        if isinstance(error.__cause__, OSError):  # among several ranks the builder hides what the disk said
            raise error.__cause__ from error
        raise
    finally:
        logger.setLevel(level)


def _mock(settings: Settings, tokenizer: Tokenizer, train_samples: int, validation_samples: int | None) -> Datasets:
    """megatron-core's mock documents: counting sequences of random length, made as they are read."""
    sizes = [train_samples, validation_samples or settings.trainer.global_batch_size, 1]
    config = _config(settings, tokenizer)
    train, validation, test = _build(MockGPTDataset, sizes, config)
    return Datasets(train, {"mock": _First(validation, sizes[1])}, {"mock": _First(test, 1)}, "mock")


def _fine_tuning(
    settings: Settings, tokenizer: Tokenizer, train_samples: int, validation_samples: int | None
) -> Datasets:
    """Packed examples; every rank packs them for itself, which takes less than handing them round."""
    data = settings.data
    folder = on_first_rank(lambda: sft.prepare(data, tokenizer))
    if not folder.is_dir():
        message = f"'{folder}' is not there on rank {_rank()}: data.cache must be a folder that all nodes share"
        raise UserError(message)
    loaded = sft.load(
        data,
        folder,
        tokenizer,
        seed=settings.trainer.seed,
        train_samples=train_samples,
        validation_samples=validation_samples,
    )
    return Datasets(loaded.train, dict(loaded.validation), dict(loaded.test), loaded.fingerprint, loaded.notes)


class _First(Dataset):
    """The first samples of a dataset."""

    def __init__(self, dataset: Dataset, samples: int):
        self._dataset, self._samples = dataset, samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int | None) -> Sample:
        return self._dataset[index]


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
