"""The training loop: settings in, a run's folder with metrics and checkpoints out."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import hybrid.quiet  # noqa: F401

# isort: split
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from hybrid import settings_file
from hybrid.checks import require
from hybrid.config import Settings
from hybrid.costs.pipeline import stage_pattern
from hybrid.data.datasets import batches, build_datasets
from hybrid.data.tokenizer import load_tokenizer
from hybrid.errors import UserError
from hybrid.model import kernels
from hybrid.model.context import own_part
from hybrid.pattern import LAYER_KINDS, Pattern
from hybrid.training import checkpoint, folder
from hybrid.training.checkpoint import Position
from hybrid.training.distributed import World, start, stop, world_size
from hybrid.training.interrupt import Interrupt
from hybrid.training.report import Report
from hybrid.training.setup import Training, set_up


@dataclass(frozen=True)
class Losses:
    """The sum of the losses over some tokens, in nats, their number, and the bytes of text they stand for."""

    total: float
    tokens: float
    size: float

    @property
    def mean(self) -> float:
        """Loss a token."""
        return self.total / max(self.tokens, 1.0)

    @property
    def bits_per_byte(self) -> float:
        """Bits that a byte of the text costs; comparable between tokenizers."""
        return self.total / math.log(2) / max(self.size, 1.0)


def train(settings: Settings) -> None:
    """Run the training that `settings` describe, as one rank of the processes there are.

    Raises ConfigError before anything is built if the settings cannot work, UserError when the run cannot go on.
    """
    require(settings, world_size())
    kernels.require(settings)
    pattern = stage_pattern(settings)
    virtual = len(pattern.segments) // settings.parallel.pipeline
    world = start(settings.parallel, virtual if virtual > 1 else None, settings.trainer.seed)
    try:
        run = Path(settings.folder) / settings.name
        if world.is_main:
            _open_folder(settings, run)
        world.barrier()
        _run(settings, pattern, run, world)
    finally:
        stop()


def _open_folder(settings: Settings, run: Path) -> None:
    """Make the run's folder, or take it up again if it holds the same run."""
    folder.refuse_other_run(settings)
    try:
        run.mkdir(parents=True, exist_ok=True)
        settings_file.write(settings, run)
    except OSError as error:
        raise UserError(f"{run}: the run's folder cannot be written: {error.strerror}") from None


def _run(settings: Settings, pattern: Pattern, run: Path, world: World) -> None:
    trainer = settings.trainer
    checkpoints = run / folder.CHECKPOINTS
    latest = folder.latest_step(checkpoints)
    tokens_per_step = trainer.global_batch_size * settings.data.sequence_length
    with Report(run, trainer.steps, latest or 0, tokens_per_step, speaks=world.is_main) as report:
        for line in describe(settings, pattern, world):
            report.say(line)
        if latest is not None and latest >= trainer.steps:
            report.say(f"finished: step {latest} of {trainer.steps} is done; raise trainer.max_steps to go on")
            return
        tokenizer = load_tokenizer(settings.data.tokenizer)
        datasets = build_datasets(
            settings,
            tokenizer,
            train_samples=trainer.samples,
            validation_samples=trainer.eval_steps * trainer.global_batch_size,
        )
        token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(world.device)
        training = set_up(settings, pattern, world.device)
        position = Position(data=datasets.fingerprint)
        if latest is not None:
            position = checkpoint.load(folder.checkpoint_folder(checkpoints, latest), settings, training)
            report.say(f"goes on from step {position.step}")
            if position.data != datasets.fingerprint:
                report.say("warning: the data has changed since; what follows is not what this run would have read")
                position = replace(position, data=datasets.fingerprint)
        elif settings.checkpoint.load:
            source = folder.find_checkpoint(settings.checkpoint.load, settings.folder)
            checkpoint.load_weights(source, [checkpoint.unwrap(chunk) for chunk in training.chunks])
            training.optimizer.reload_model_params()
            report.say(f"starts from the weights in {source}")
        parameters = world.total(training.parameters() / _copies(settings, world))[0]
        report.say(f"{parameters:,.0f} parameters; run folder {run}")

        with Interrupt() as interrupt:
            data = [iter(_batches(settings, datasets.train, position.samples)) for _ in training.chunks]
            saved = position
            while position.step < trainer.steps:
                values = _step(settings, training, data, token_bytes, position, world)
                position = replace(
                    position, step=position.step + 1, samples=position.samples + trainer.global_batch_size
                )
                report.step(position.step, values, write=position.step % trainer.log_interval == 0)
                stop_now = world.any(interrupt.wanted)
                last = position.step == trainer.steps
                if last or (trainer.eval_interval and position.step % trainer.eval_interval == 0 and not stop_now):
                    for name, held_out in datasets.validation.items():
                        losses = _validate(settings, training, held_out, token_bytes, world)
                        report.validation(position.step, name, losses.mean, losses.bits_per_byte)
                if last or stop_now or position.step % settings.checkpoint.save_interval == 0:
                    checkpoint.save(checkpoints, settings, training, position, world)
                    saved = position
                    report.pause()
                if stop_now and not last:
                    report.say(f"interrupted: step {saved.step} is saved; the same command goes on from there")
                    raise interrupt.exit()
        report.say(f"done: {position.step} steps, checkpoint {folder.checkpoint_folder(checkpoints, position.step)}")


def describe(settings: Settings, pattern: Pattern, world: World) -> Iterator[str]:
    """What is trained and on what, line by line: the pattern, the count of each kind and the ratios reached."""
    counts = ", ".join(
        f"{count} {LAYER_KINDS[symbol]}" for symbol, count in pattern.counts(include_mtp=False).items() if count
    )
    ratios = ", ".join(f"{LAYER_KINDS[symbol]} {share:.3f}" for symbol, share in pattern.ratios().items() if share)
    yield f"layer pattern {pattern}"
    yield f"{pattern.num_layers} layers: {counts} (ratios {ratios})"
    parallel = settings.parallel
    data_parallel = world.size // parallel.model_size
    yield (
        f"{world.size} process{'es' if world.size > 1 else ''} on {world.device.type}: data parallel {data_parallel}, "
        f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, context {parallel.context}"
    )


def _copies(settings: Settings, world: World) -> int:
    """Ranks that hold the same parameters."""
    return world.size // (settings.parallel.tensor * settings.parallel.pipeline)


def _batches(settings: Settings, dataset: Any, consumed_samples: int = 0, *, fill_up: bool = False) -> Any:
    """This rank's micro batches of a dataset, from a sample on."""
    return batches(
        dataset,
        consumed_samples=consumed_samples,
        micro_batch_size=settings.trainer.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        num_workers=settings.data.num_workers,
        fill_up=fill_up,
    )


def _micro_batches(settings: Settings) -> int:
    """Micro batches of one step on one rank."""
    return settings.trainer.global_batch_size // (
        settings.trainer.micro_batch_size * parallel_state.get_data_parallel_world_size()
    )


def _forward_step(token_bytes: Tensor, batch_iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    """What Megatron's schedules call for each micro batch. token_bytes (vocabulary)."""
    part = partial(
        own_part,
        rank=parallel_state.get_context_parallel_rank(),
        ranks=parallel_state.get_context_parallel_world_size(),
    )
    batch = {key: part(value).to(token_bytes.device, non_blocking=True) for key, value in next(batch_iterator).items()}
    mask = batch["loss_mask"]
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=mask)
    size = (token_bytes[batch["labels"]] * mask).sum()
    return output, partial(_loss, mask, size)


def _loss(loss_mask: Tensor, size: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses (B, S) under the mask, tokens counted, and (sum, tokens, bytes) for the report."""
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    return total, tokens.to(torch.int), torch.stack([total.detach().double(), tokens.double(), size.double()])


def _step(
    settings: Settings,
    training: Training,
    data: list[Iterator[dict[str, Tensor]]],
    token_bytes: Tensor,
    position: Position,
    world: World,
) -> dict[str, float]:
    """One optimizer step; what is to be recorded of it."""
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    sums = _forward_backward(settings, training, data, token_bytes, _micro_batches(settings), forward_only=False)
    losses = _total(sums, world)
    if not math.isfinite(losses.mean):
        raise UserError(
            f"step {position.step + 1}: the loss is {losses.mean}; nothing of this step is kept. Lower optimizer.lr or "
            "look at the data, then run the same command to go on from the last checkpoint"
        )
    optimizer: Any = training.optimizer
    _, grad_norm, _ = optimizer.step()
    training.scheduler.step(increment=settings.trainer.global_batch_size)
    return {
        "samples": position.samples + settings.trainer.global_batch_size,
        "loss": losses.mean,
        "bits_per_byte": losses.bits_per_byte,
        "lr": optimizer.param_groups[0]["lr"],
        "grad_norm": float(grad_norm or 0.0),
    }


def _validate(settings: Settings, training: Training, dataset: Any, token_bytes: Tensor, world: World) -> Losses:
    """Losses over a held-out set: the same sequences every time."""
    loader = _batches(settings, dataset, fill_up=True)
    for chunk in training.chunks:
        chunk.eval()
    with torch.no_grad():
        data = [iter(loader) for _ in training.chunks]
        sums = _forward_backward(settings, training, data, token_bytes, len(loader), forward_only=True)
    for chunk in training.chunks:
        chunk.train()
    return _total(sums, world)


def _forward_backward(
    settings: Settings,
    training: Training,
    data: list[Iterator[dict[str, Tensor]]],
    token_bytes: Tensor,
    micro_batches: int,
    *,
    forward_only: bool,
) -> list[Tensor]:
    """Megatron's schedule over some micro batches; the last stage's (sum of losses, tokens, bytes) of each."""
    forward_backward: Any = get_forward_backward_func()
    return forward_backward(
        forward_step_func=partial(_forward_step, token_bytes),
        data_iterator=data if len(data) > 1 else data[0],
        model=training.chunks if len(data) > 1 else training.chunks[0],
        num_microbatches=micro_batches,
        seq_length=settings.data.sequence_length,
        micro_batch_size=settings.trainer.micro_batch_size,
        forward_only=forward_only,
    )


def _total(sums: list[Tensor], world: World) -> Losses:
    """The sums over all processes. Only the last pipeline stage has any; its tensor-parallel ranks have the same."""
    own = [0.0, 0.0, 0.0]
    if sums and parallel_state.get_tensor_model_parallel_rank() == 0:
        own = torch.stack(sums).sum(0).tolist()
    return Losses(*world.total(*own))
