"""One optimizer step and one validation: Megatron's schedules over this rank's micro batches."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from hybrid.config import Settings
from hybrid.data.datasets import batches
from hybrid.model.context import own_part
from hybrid.model.packing import pack, row
from hybrid.training import faults
from hybrid.training.distributed import World
from hybrid.training.faults import Judge
from hybrid.training.metrics import Clock
from hybrid.training.setup import Training

Batches = list[Iterator[dict[str, Tensor]]]


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


@dataclass
class Stepper:
    """What every step needs. `token_bytes` (vocabulary); `progress` is called with what comes next, again and again."""

    settings: Settings
    training: Training
    token_bytes: Tensor
    world: World
    clock: Clock
    judge: Judge
    progress: Callable[[str], None] = lambda _: None

    def step(self, data: Batches, number: int, batch: int) -> dict[str, float]:
        """One optimizer step, the `number`th, of `batch` samples over all processes; what is to be recorded of it.

        Raises BadStep before anything is changed.
        """
        training = self.training
        for chunk in training.chunks:
            chunk.zero_grad_buffer()
        training.optimizer.zero_grad()
        with self.clock("forward_backward"):
            sums = self._forward_backward(
                data, micro_batches(self.settings, batch), f"step {number}", forward_only=False
            )
            losses = self._total(sums)
        self.progress(f"the optimizer's part of step {number}")
        self.judge.loss(losses.mean)
        with self.clock("optimizer"):
            grad_norm = faults.update(training.optimizer, self.judge.norm)
        training.scheduler.step(increment=batch)
        optimizer: Any = training.optimizer
        return {
            "loss": losses.mean,
            "bits_per_byte": losses.bits_per_byte,
            "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
        }

    def validate(self, dataset: Any, name: str) -> Losses:
        """Losses over a held-out set: the same sequences every time."""
        training = self.training
        loader = micro_batch_loader(self.settings, dataset, fill_up=True)
        for chunk in training.chunks:
            chunk.eval()
        with torch.no_grad():
            data = [iter(loader) for _ in training.chunks]
            sums = self._forward_backward(data, len(loader), f"validation on '{name}'", forward_only=True)
        for chunk in training.chunks:
            chunk.train()
        return self._total(sums)

    def _forward_backward(self, data: Batches, count: int, doing: str, *, forward_only: bool) -> list[Tensor]:
        """Megatron's schedule over some micro batches; the last stage's (sum of losses, tokens, bytes) of each."""
        forward_backward: Any = get_forward_backward_func()
        data_config, micro_batch = self.settings.data, self.settings.trainer.micro_batch_size
        positions, rows = row(data_config.sequence_length, micro_batch, packed=data_config.source == "sft")
        return forward_backward(
            forward_step_func=partial(self._forward_step, doing),
            data_iterator=data if len(data) > 1 else data[0],
            model=self.training.chunks if len(data) > 1 else self.training.chunks[0],
            num_microbatches=count,
            seq_length=positions,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    def _forward_step(self, doing: str, data: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
        """What Megatron's schedules call for each micro batch."""
        device = self.token_bytes.device
        part = partial(
            own_part,
            rank=parallel_state.get_context_parallel_rank(),
            ranks=parallel_state.get_context_parallel_world_size(),
        )
        self.progress(f"{doing}, waiting for data")
        with self.clock("data"):
            read = next(data)
        self.progress(doing)
        batch, packed = pack({key: part(value) for key, value in read.items()}, device)
        mask = batch["loss_mask"]
        output = model(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            loss_mask=mask,
            packed_seq_params=packed,
        )
        size = (self.token_bytes[batch["labels"]] * mask).sum()
        return output, partial(_loss, mask, size)

    def _total(self, sums: list[Tensor]) -> Losses:
        """Sums over all processes. Only the last pipeline stage has any; its tensor-parallel ranks have the same."""
        own = [0.0, 0.0, 0.0]
        if sums and parallel_state.get_tensor_model_parallel_rank() == 0:
            own = torch.stack(sums).sum(0).tolist()
        return Losses(*self.world.total(*own))


def micro_batch_loader(settings: Settings, dataset: Any, consumed_samples: int = 0, *, fill_up: bool = False) -> Any:
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


def micro_batches(settings: Settings, batch: int) -> int:
    """Micro batches of one rank in a step of `batch` samples."""
    return batch // (settings.trainer.micro_batch_size * parallel_state.get_data_parallel_world_size())


def _loss(loss_mask: Tensor, size: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses (B, S) under the mask, tokens counted, and (sum, tokens, bytes) for the report."""
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    return total, tokens.to(torch.int), torch.stack([total.detach().double(), tokens.double(), size.double()])
