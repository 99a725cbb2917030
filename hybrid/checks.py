"""Everything that can be wrong with the settings of a run, found before anything is built, without torch.

One function, `check`, is what `show`, `plan`, `pretrain`, a launch and the job itself ask. A problem names the field,
the rule with its numbers, and the nearest values that would do. The rules are megatron-core 0.19's (its assertions are
in `transformer_config.py`, `mamba_mixer.py`, `mamba_context_parallel.py`, `moe_layer.py`, `schedules.py` and
`training/arguments.py`), transformer-engine's for FP8, and this project's own where Megatron would go on silently.

Not here, because only the machine can tell: which devices and kernels there are, whether files exist.
"""

from collections.abc import Iterator

from hybrid import fields, layer_checks
from hybrid.config import Settings
from hybrid.errors import ConfigError, Problem
from hybrid.fields import multiple_of, sizes_that
from hybrid.pattern import CONVERTED, LAYER_KINDS, Pattern

# Bytes and the end of a document.
BYTE_VOCABULARY = 257


def require(settings: Settings, world_size: int | None = None) -> None:
    """Raise ConfigError with every problem of `check`, if there is one."""
    problems = check(settings, world_size)
    if problems:
        raise ConfigError(problems)


def check(settings: Settings, world_size: int | None = None) -> list[Problem]:
    """Return everything that is wrong with these settings; empty if they can run.

    `world_size` is the number of processes; None leaves out the rules that depend on it. Values of a wrong type or
    out of range come alone: the rules between fields mean nothing on them.
    """
    return fields.wrong_types(settings) or fields.out_of_range(settings) or rules(settings, world_size)


def rules(settings: Settings, world_size: int | None = None) -> list[Problem]:
    """Return what contradicts itself in settings whose values are of the right types and in range."""
    problems: list[Problem] = []
    try:
        pattern = settings.model.pattern
    except ConfigError as error:
        # Rules that need no pattern still hold.
        problems, pattern = list(error.problems), None
    problems += layer_checks.model(settings)
    problems += _rampup(settings, world_size)
    problems += _batches_and_schedule(settings)
    problems += _data(settings)
    problems += _parallel(settings)
    problems += _world(settings, world_size)
    if pattern is not None:
        problems += layer_checks.layers(settings, pattern)
        problems += _pipeline(settings, pattern, world_size)
        problems += _export(settings, pattern)
        if settings.trainer.precision.startswith("fp8"):
            problems += layer_checks.fp8(settings, pattern)
    return problems


def _parallel(settings: Settings) -> Iterator[Problem]:
    parallel, length = settings.parallel, settings.data.sequence_length
    if parallel.sequence and parallel.tensor == 1:
        yield Problem(
            "parallel.sequence",
            "is True, but there is nothing to split without tensor parallelism; set it to False, "
            "or parallel.tensor to 2 or more",
        )
    if parallel.context > 1:
        # Each rank takes one part from the front and one from the back, so that causal attention is balanced.
        what = f"2 x parallel.context (2 x {parallel.context})"
        yield from multiple_of("data.sequence_length", length, 2 * parallel.context, what)
    if parallel.sequence and length % parallel.context == 0:
        divisor = parallel.tensor * parallel.context
        what = f"parallel.tensor x parallel.context ({parallel.tensor} x {parallel.context}) under sequence parallelism"
        yield from multiple_of("data.sequence_length", length, divisor, what)
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        yield Problem(
            "parallel.overlap_param_gather",
            "is True, but needs parallel.distributed_optimizer=True and parallel.overlap_grad_reduce=True",
        )
    if settings.optimizer.precision_aware:
        if not parallel.distributed_optimizer:
            yield Problem("optimizer.precision_aware", "is True, but needs parallel.distributed_optimizer=True")
        if settings.trainer.precision == "fp32":
            yield Problem(
                "optimizer.precision_aware", "is True, but trainer.precision is 'fp32'; set it to False, or use 'bf16'"
            )


def _pipeline(settings: Settings, pattern: Pattern, world_size: int | None) -> Iterator[Problem]:
    """Segments against stages, and micro batches against virtual stages."""
    pipeline, segments = settings.parallel.pipeline, len(pattern.segments)
    if pattern.num_layers < pipeline:
        yield Problem(
            "parallel.pipeline",
            f"is {pipeline}, but the pattern has {pattern.num_layers} layers and every stage holds at least one; "
            f"nearest: {pattern.num_layers}",
        )
    elif segments > 1 and segments % pipeline:
        near = sizes_that(lambda size: segments % size == 0, pipeline, "parallel.pipeline")
        yield Problem(
            "model.layer_pattern",
            f"has {segments} segments, but they must be a multiple of parallel.pipeline ({pipeline}); take the '|' out "
            f"to have the layers split evenly by cost{near}",
        )
    elif segments > pipeline > 1 and world_size and world_size % settings.parallel.model_size == 0:
        trainer = settings.trainer
        replicas = settings.replicas(world_size)
        per_step = trainer.micro_batch_size * replicas
        if trainer.global_batch_size % per_step == 0 and trainer.global_batch_size // per_step % pipeline:
            what = (
                f"micro batch x data parallel size x parallel.pipeline ({trainer.micro_batch_size} x {replicas} x "
                f"{pipeline}) with virtual stages ({segments} segments on {pipeline} stages)"
            )
            yield from multiple_of("trainer.global_batch_size", trainer.global_batch_size, per_step * pipeline, what)


def _export(settings: Settings, pattern: Pattern) -> Iterator[Problem]:
    """What the converters would refuse when the run is done."""
    strange = [f"{symbol} ({LAYER_KINDS[symbol]})" for symbol, count in pattern.counts().items() if count]
    strange = [name for name in strange if name[0] not in CONVERTED]
    if settings.checkpoint.export and strange:
        yield Problem(
            "checkpoint.export",
            f"is '{settings.checkpoint.export}', but the converters know no {', '.join(strange)}; set it to None",
        )


def _world(settings: Settings, world_size: int | None) -> Iterator[Problem]:
    """The number of processes against the layout and the batch."""
    parallel, trainer = settings.parallel, settings.trainer
    if world_size is None:
        what = f"trainer.micro_batch_size ({trainer.micro_batch_size})"
        yield from multiple_of("trainer.global_batch_size", trainer.global_batch_size, trainer.micro_batch_size, what)
        return
    layout = f"tensor x pipeline x context ({parallel.tensor} x {parallel.pipeline} x {parallel.context})"
    if world_size % parallel.model_size:
        below, above = world_size // parallel.model_size, world_size // parallel.model_size + 1
        nearest = " or ".join(str(count * parallel.model_size) for count in (below, above) if count)
        yield Problem(
            "parallel",
            f"wants processes in multiples of {layout} = {parallel.model_size}, but there are {world_size}; "
            f"nearest: {nearest} processes",
        )
        return
    replicas = world_size // parallel.model_size
    shared = replicas * parallel.context
    if shared % parallel.expert:
        near = sizes_that(lambda size: shared % size == 0, parallel.expert, "parallel.expert")
        yield Problem(
            "parallel.expert",
            f"is {parallel.expert}, but must divide the data parallel x context parallel size ({shared} = {world_size} "
            f"processes / tensor {parallel.tensor} / pipeline {parallel.pipeline}){near}",
        )
    what = f"trainer.micro_batch_size x data parallel size ({trainer.micro_batch_size} x {replicas})"
    way_out = ""
    if trainer.global_batch_size < replicas * trainer.micro_batch_size:
        fewer = trainer.global_batch_size // trainer.micro_batch_size * parallel.model_size
        way_out = f"; or use at most {fewer} process{'es' if fewer > 1 else ''}" if fewer else ""
    yield from multiple_of(
        "trainer.global_batch_size",
        trainer.global_batch_size,
        trainer.micro_batch_size * replicas,
        what,
        way_out,
    )


NO_LENGTH = Problem("trainer.max_steps", "is not set, and trainer.max_samples is not either; set one of them")


def _batches_and_schedule(settings: Settings) -> Iterator[Problem]:
    trainer, optimizer = settings.trainer, settings.optimizer
    warmups = [n for n in ("warmup_samples", "warmup_steps", "warmup_tokens") if getattr(optimizer, n) is not None]
    if len(warmups) > 1:
        yield Problem(f"optimizer.{warmups[0]}", f"and optimizer.{warmups[1]} are both set; set one of them to None")
    if trainer.max_steps is None and trainer.max_samples is None:
        yield NO_LENGTH
    elif trainer.max_steps is not None and trainer.max_samples is not None:
        yield Problem("trainer.max_steps", "and trainer.max_samples are both set; set one of them to None")
    elif trainer.steps < 1:
        yield Problem(
            "trainer.max_samples",
            f"is {trainer.max_samples}, less than one global batch of {trainer.global_batch_size} samples",
        )
    elif settings.warmup_samples >= (optimizer.decay_samples or trainer.samples):
        yield _too_long_a_warmup(settings)
    elif optimizer.wsd_decay_samples is not None:
        whole = (optimizer.decay_samples or trainer.samples) - settings.warmup_samples
        if optimizer.schedule != "wsd":
            yield Problem(
                "optimizer.wsd_decay_samples",
                f"is {optimizer.wsd_decay_samples}, but optimizer.schedule is '{optimizer.schedule}'; set it to None, "
                "or optimizer.schedule to 'wsd'",
            )
        elif optimizer.wsd_decay_samples > whole:
            yield Problem(
                "optimizer.wsd_decay_samples",
                f"is {optimizer.wsd_decay_samples}, but between warm-up and end there are {whole} samples; "
                f"nearest: {whole}",
            )
    if trainer.profile and not (len(trainer.profile) == 2 and 1 <= trainer.profile[0] <= trainer.profile[1]):
        yield Problem("trainer.profile", f"is {trainer.profile}, but must be a first and a last step: [10,12]")
    if (trainer.max_steps is None) != (trainer.max_samples is None):
        for field, last in (("profile", max(trainer.profile, default=0)), ("memory_snapshot", trainer.memory_snapshot)):
            if (last or 0) > trainer.steps:
                yield Problem(
                    f"trainer.{field}",
                    f"is {getattr(trainer, field)}, but the run ends at step {trainer.steps}; name an earlier step",
                )
    if optimizer.min_lr > optimizer.lr:
        yield Problem("optimizer.min_lr", f"is {optimizer.min_lr}, above optimizer.lr ({optimizer.lr})")
    if settings.trainer.precision.startswith("fp8") and settings.model.kernels == "reference":
        yield Problem(
            "model.kernels",
            f"is 'reference', but trainer.precision '{trainer.precision}' needs transformer-engine; "
            "set model.kernels to 'auto', or trainer.precision to 'bf16'",
        )


def _too_long_a_warmup(settings: Settings) -> Problem:
    optimizer, trainer = settings.optimizer, settings.trainer
    end = optimizer.decay_samples or trainer.samples
    name = "optimizer.decay_samples" if optimizer.decay_samples else "the samples of the run"
    given = next(n for n in ("warmup_steps", "warmup_tokens", "warmup_samples") if getattr(optimizer, n) is not None)
    nearest = {
        "warmup_steps": trainer.ramp.steps(end - 1),
        "warmup_tokens": (end - 1) * settings.data.sequence_length,
        "warmup_samples": end - 1,
    }
    samples = "" if given == "warmup_samples" else f", that is {settings.warmup_samples} samples"
    return Problem(
        f"optimizer.{given}",
        f"is {getattr(optimizer, given)}{samples}, but must be below {name} ({end}), where the decay ends; "
        f"nearest: {nearest[given]}",
    )


def _rampup(settings: Settings, world_size: int | None) -> Iterator[Problem]:
    """The growth of the batch; its steps have to suit micro batch and data parallel size as the whole batch has."""
    trainer, place = settings.trainer, "trainer.rampup_batch_size"
    if not trainer.rampup_batch_size:
        return
    if len(trainer.rampup_batch_size) != 3 or min(trainer.rampup_batch_size) < 1:
        yield Problem(
            place, f"is {trainer.rampup_batch_size}, but must be a batch, its rises and samples: [32,32,100000]"
        )
        return
    start, increment, _ = trainer.rampup_batch_size
    if start > trainer.global_batch_size or (trainer.global_batch_size - start) % increment:
        yield Problem(
            place,
            f"goes from {start} in rises of {increment}, which does not lead to trainer.global_batch_size "
            f"({trainer.global_batch_size})",
        )
    replicas = max(1, (world_size or 1) // settings.parallel.model_size)
    divisor = trainer.micro_batch_size * replicas
    what = f"trainer.micro_batch_size x data parallel size ({trainer.micro_batch_size} x {replicas})"
    for name, value in (("start", start), ("rise", increment)):
        if value % divisor:
            near = max(1, round(value / divisor)) * divisor
            yield Problem(place, f"has a {name} of {value}, but it must be a multiple of {what}; nearest: {near}")


# What each source reads from data.path.
_READS = {
    "text": "a folder of text files",
    "indexed": "the prefix of .bin/.idx files",
    "sft": "JSONL files of examples",
}


def _data(settings: Settings) -> Iterator[Problem]:
    data = settings.data
    if data.source in _READS and not data.path:
        kind = _READS[data.source]
        yield Problem("data.path", f"is not set, but data.source '{data.source}' reads {kind}")
    if data.source in ("stdlib", "mock") and data.path:
        yield Problem(
            "data.path",
            f"is '{data.path}', but data.source '{data.source}' reads no path; set data.source to 'text', "
            "'indexed' or 'sft'",
        )
    for name in ("validation_path", "test_path"):
        if getattr(data, name) and data.source not in ("indexed", "sft"):
            yield Problem(
                f"data.{name}",
                f"is '{getattr(data, name)}', but only data.source 'indexed' and 'sft' read it, and it is "
                f"'{data.source}'",
            )
    if data.source == "sft" and settings.parallel.context > 1:
        yield Problem(
            "parallel.context",
            f"is {settings.parallel.context}, but data.source 'sft' packs several sequences into a row, which are not "
            "cut over ranks; set it to 1",
        )
    if len(data.split) != 3 or min(data.split, default=0.0) < 0 or not data.split[0] > 0:
        yield Problem(
            "data.split",
            f"is {data.split}, but must be three shares of at least 0 for training, validation and test, "
            "the first above 0, such as [99, 1, 0]",
        )
    if data.tokenizer == "byte" and settings.model.vocab_size < BYTE_VOCABULARY:
        yield Problem(
            "model.vocab_size",
            f"is {settings.model.vocab_size}, but the byte tokenizer has {BYTE_VOCABULARY} tokens; "
            f"nearest: {BYTE_VOCABULARY}",
        )
    if settings.name[:1] in ("", ".", "-") or set(settings.name) & set("/\\\0\n"):
        yield Problem(
            "name",
            f"is {settings.name!r}, but the run's folder is called so: it begins with neither '.' nor '-' and has no "
            "slash, backslash or end of line",
        )
