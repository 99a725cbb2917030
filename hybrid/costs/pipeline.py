"""Pipeline stages: which layers each holds, what they cost, and how long the stages wait for each other."""

from hybrid.config import Settings
from hybrid.costs import hardware, speed
from hybrid.pattern import Pattern, split


def stage_pattern(settings: Settings) -> Pattern:
    """Return the pattern whose segments are the pipeline stages that the model is built with.

    Without pipeline parallelism the segments of the pattern are dissolved; a pattern with '|' keeps them; one without
    is split so that the slowest stage is as fast as possible, the output layer and the MTP depths counted with the
    last. The split is the same on every machine: it takes the speeds of one reference GPU.
    """
    pattern, stages = settings.model.pattern, settings.parallel.pipeline
    if stages == 1:
        return Pattern((pattern.layers,), pattern.mtp, pattern.mtp_depths)
    if len(pattern.segments) > 1:
        return pattern
    return balanced(settings, pattern, stages)


def balanced(settings: Settings, pattern: Pattern, segments: int) -> Pattern:
    """Return `pattern` cut into segments that take as equal a time as can be on the reference GPU."""
    gpu = hardware.REFERENCE
    costs = {symbol: speed.layer(settings, symbol, gpu).total for symbol in set(pattern.layers + pattern.mtp)}
    last = speed.output(settings, gpu).total * (1 + pattern.mtp_depths)
    last += sum(costs[symbol] for symbol in pattern.mtp) * pattern.mtp_depths
    return split(pattern, segments, costs, last=last)


def chunks_of(pattern: Pattern, stages: int, stage: int) -> range:
    """Segments that a stage holds: several with virtual stages."""
    return range(stage, len(pattern.segments), stages)


def in_flight(pattern: Pattern, stages: int, stage: int, micro_batches: int) -> float:
    """Micro batches whose activations a stage holds at its fullest, each counted by the part of its layers it is in.

    One forward, one backward in turn: as many as there are stages from here to the end. With v virtual stages
    (interleaved schedule), 2 (stages - stage - 1) + (v - 1) stages + 1 chunks of 1/v each (megatron-core's
    `schedules.py`, warm-up of `forward_backward_pipelining_with_interleaving`).
    """
    virtual = len(pattern.segments) // stages
    if virtual == 1:
        return float(min(micro_batches, stages - stage))
    chunks = 2 * (stages - stage - 1) + (virtual - 1) * stages + 1
    return min(chunks, micro_batches * virtual) / virtual


def bubble(stage_seconds: list[float], micro_batches: int, virtual: int) -> tuple[float, float]:
    """Return (seconds of all micro batches through all stages, share of it that the slowest stage waits).

    `stage_seconds` are those of one micro batch, forward and backward. The slowest stage works without a break once
    it has begun; before and after it, one micro batch (1 / `virtual` of its layers at a time) goes through the others.
    """
    slowest = max(stage_seconds)
    total = micro_batches * slowest + (sum(stage_seconds) - slowest) / virtual
    return total, 1 - micro_batches * slowest / total
