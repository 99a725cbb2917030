"""Everything about a run that can be known before it: what `hybrid plan` prints."""

from dataclasses import asdict, dataclass
from math import lcm
from typing import Any

from hybrid import pattern as patterns
from hybrid.checks import require
from hybrid.config import Settings
from hybrid.costs import communication, flops, memory, parameters, pipeline, speed
from hybrid.costs import hardware as hw
from hybrid.costs.communication import Axis
from hybrid.costs.flops import Flops
from hybrid.costs.hardware import GPUS, Gpu
from hybrid.costs.memory import Inference, Memory
from hybrid.costs.parameters import Parameters
from hybrid.errors import ConfigError, Problem
from hybrid.pattern import Pattern


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, as each of its ranks sees it."""

    layers: tuple[str, ...]  # one entry per virtual stage
    parameters: Parameters
    memory: Memory
    in_flight: float  # micro batches whose activations it holds at its fullest
    compute_seconds: float  # of one micro batch, on the GPU
    launch_seconds: float  # of one micro batch, for the host: the stage takes the longer of the two
    communication: dict[str, Axis]


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step. `parts` add up to `seconds`; overlapped messages are not in it."""

    seconds: float
    parts: dict[str, float]
    bubble: float  # share of the step's forward and backward passes that the slowest stage waits


@dataclass(frozen=True)
class Plan:
    """What a run is and costs. Bytes, seconds, tokens; `as_dict` has the derived figures too."""

    name: str
    gpu: str
    capacity: float  # bytes of a GPU's memory that PyTorch sees
    world_size: int
    layout: dict[str, int]
    micro_batches: int
    pattern: str  # with the pipeline segments that the model is built with
    counts: dict[str, int]
    parameters: Parameters
    active_parameters: int
    flops: Flops
    inference: Inference
    stages: tuple[Stage, ...]
    step: Step
    stated_mfu: float | None
    steps: int
    batches: float  # full global batches that the run's samples make: its steps, fewer where the batch grows
    samples: int
    tokens_per_step: int
    peak_flops: float

    @property
    def strip(self) -> str:
        """The pattern as a picture in text."""
        return patterns.strip(patterns.parse(self.pattern))

    @property
    def memory(self) -> Memory:
        """Memory of the stage that needs most."""
        return max((stage.memory for stage in self.stages), key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        """Whether every stage fits into the GPU's memory, with what CUDA and fragments take on top."""
        return all(stage.memory.fits(self.capacity) for stage in self.stages)

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: predicted, or from the MFU that was stated."""
        if self.stated_mfu is None:
            return self.step.seconds
        return self.flops.total * self.tokens_per_step / (self.stated_mfu * self.peak_flops * self.world_size)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: operations that the model needs over those the GPUs could do (bf16 peak)."""
        return self.flops.total * self.tokens_per_step / (self.step_seconds * self.peak_flops * self.world_size)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput."""
        return self.tokens_per_step / self.step_seconds / self.world_size

    @property
    def tokens(self) -> float:
        """Tokens of all steps."""
        return self.batches * self.tokens_per_step

    @property
    def seconds(self) -> float:
        """Seconds of all steps; validation and checkpoints come on top."""
        return self.batches * self.step_seconds

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours of all steps."""
        return self.seconds / 3600 * self.world_size

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, texts and numbers, the derived figures among them."""
        return asdict(self) | {
            "strip": self.strip,
            "parameters": asdict(self.parameters)
            | {
                "total": self.parameters.total,
                "non_embedding": self.parameters.non_embedding,
                "active": self.active_parameters,
            },
            "flops_per_token": self.flops.parts
            | {"forward": self.flops.forward, "backward": self.flops.backward, "total": self.flops.total},
            "memory": asdict(self.memory) | {"total": self.memory.total, "capacity": self.capacity},
            "fits": self.fits,
            "step_seconds": self.step_seconds,
            "mfu": self.mfu,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "gpu_hours": self.gpu_hours,
        }


def find_gpu(name: str) -> Gpu:
    """Return the GPU of that name. Raises ConfigError with the names there are."""
    if name.lower() not in GPUS:
        raise ConfigError(Problem("gpu", f"'{name}' is unknown; the GPUs with figures are {', '.join(GPUS)}"))
    return GPUS[name.lower()]


def smallest_world(settings: Settings) -> int:
    """Fewest processes that the layout takes."""
    parallel = settings.parallel
    return lcm(parallel.model_size, parallel.tensor * parallel.pipeline * parallel.expert)


def plan(settings: Settings, gpu: str = "h100", world_size: int | None = None, mfu: float | None = None) -> Plan:
    """Return what a run costs on `world_size` GPUs (None: the fewest that its layout takes).

    `mfu`, between 0 and 1, takes the place of the predicted step time. Raises ConfigError with everything that is
    wrong with the settings, or for a GPU without figures.
    """
    device = find_gpu(gpu)
    problems = []
    if mfu is not None and not 0 < mfu <= 1:
        problems.append(Problem("mfu", f"is {mfu}, but a utilisation lies between 0 and 1"))
    if world_size is not None and world_size < 1:
        problems.append(Problem("gpus", f"is {world_size}, but a run has at least 1"))
    if settings.trainer.precision.startswith("fp8") and device.fp8 is None:
        problems.append(
            Problem(
                "trainer.precision", f"is '{settings.trainer.precision}', which {device.name} cannot do; use 'bf16'"
            )
        )
    if problems:
        raise ConfigError(problems)
    require(settings)
    world = world_size or smallest_world(settings)
    require(settings, world)
    return evaluate(settings, device, world, mfu)


def evaluate(settings: Settings, gpu: Gpu, world_size: int, mfu: float | None = None) -> Plan:
    """`plan` for settings that have been checked."""
    parallel, trainer = settings.parallel, settings.trainer
    pattern = pipeline.stage_pattern(settings)
    per_token = [seconds.total for seconds in speed.segments(settings, pattern, gpu)]
    stages = tuple(stage(settings, pattern, index, world_size, gpu, per_token) for index in range(parallel.pipeline))
    return Plan(
        name=settings.name,
        gpu=gpu.name,
        capacity=gpu.memory,
        world_size=world_size,
        layout={
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual": len(pattern.segments) // parallel.pipeline,
            "context": parallel.context,
            "expert": parallel.expert,
            "data": settings.replicas(world_size),
        },
        micro_batches=settings.micro_batches(world_size),
        pattern=pattern.text,
        counts=pattern.counts(),
        parameters=parameters.whole(settings),
        active_parameters=parameters.active(settings),
        flops=flops.per_token(settings),
        inference=memory.inference(settings),
        stages=stages,
        step=step(settings, pattern, stages, world_size, gpu),
        stated_mfu=mfu,
        steps=trainer.steps,
        batches=trainer.ramp.consumed(trainer.steps) / trainer.global_batch_size,
        samples=trainer.samples,
        tokens_per_step=trainer.global_batch_size * settings.data.sequence_length,
        peak_flops=gpu.bf16,
    )


def stage(settings: Settings, pattern: Pattern, index: int, world_size: int, gpu: Gpu, per_token: list[float]) -> Stage:
    """What one rank of pipeline stage `index` holds and does; `per_token` are the seconds of each segment."""
    parallel, trainer = settings.parallel, settings.trainer
    chunks = pipeline.chunks_of(pattern, parallel.pipeline, index)
    micro_batches = settings.micro_batches(world_size)
    tokens = trainer.micro_batch_size * settings.data.sequence_length / parallel.context
    seconds = sum(per_token[chunk] for chunk in chunks) * tokens
    held = parameters.rank(settings, pattern, index)
    return Stage(
        layers=tuple(pattern.segments[chunk] for chunk in chunks),
        parameters=held,
        memory=memory.training(settings, pattern, index, world_size),
        in_flight=pipeline.in_flight(pattern, parallel.pipeline, index, micro_batches),
        compute_seconds=seconds + speed.accumulate(settings, held.total, gpu),
        launch_seconds=speed.launch(settings, pattern, index),
        communication=communication.per_step(settings, pattern, index, world_size, gpu),
    )


def step(settings: Settings, pattern: Pattern, stages: tuple[Stage, ...], world_size: int, gpu: Gpu) -> Step:
    """Predict the seconds of an optimizer step: the slowest stage, its messages, waiting for others, the update."""
    parallel, replicas = settings.parallel, settings.replicas(world_size)
    micro_batches = settings.micro_batches(world_size)

    def messages(stage: Stage) -> dict[str, float]:
        return {name: axis.seconds / micro_batches for name, axis in stage.communication.items() if name != "data"}

    # Launches run ahead of the GPU, so the host only counts where it is slower than everything the GPU does.
    busy = [stage.compute_seconds + sum(messages(stage).values()) for stage in stages]
    per_stage = [max(seconds, stage.launch_seconds) for seconds, stage in zip(busy, stages, strict=True)]
    virtual = len(pattern.segments) // parallel.pipeline
    passes, waiting = pipeline.bubble(per_stage, micro_batches, virtual)
    slowest = per_stage.index(max(per_stage))
    parts = {"compute": micro_batches * stages[slowest].compute_seconds}
    parts |= {name: micro_batches * seconds for name, seconds in messages(stages[slowest]).items()}
    parts["launch"] = micro_batches * (per_stage[slowest] - busy[slowest])
    parts["bubble"] = passes * waiting
    parts["data"] = max(_exposed(settings, stage) for stage in stages)
    shared = replicas * parallel.context if parallel.distributed_optimizer else 1
    largest = max(stage.parameters.total for stage in stages)
    parts["optimizer"] = speed.optimizer(settings, largest / shared, gpu)
    return Step(sum(parts.values()), {name: seconds for name, seconds in parts.items() if seconds}, waiting)


def _exposed(settings: Settings, stage: Stage) -> float:
    """Seconds of the data parallel messages that no computation hides: reductions overlap with one backward pass."""
    axis = stage.communication.get("data")
    if axis is None:
        return 0.0
    parallel = settings.parallel
    flags = (parallel.overlap_grad_reduce, parallel.overlap_param_gather)
    halves = [axis.seconds / 2 * (1 - hw.OVERLAP_SHARE if flag else 1) for flag in flags]
    return max(sum(halves), axis.seconds - stage.compute_seconds)
