"""Layouts of a model on a number of GPUs: which are allowed, which fit, which are fast."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hybrid.checks import check, rules
from hybrid.config import Settings
from hybrid.costs import hardware as hw
from hybrid.costs import memory, pipeline
from hybrid.costs.hardware import Gpu
from hybrid.costs.plan import Plan, evaluate, find_gpu
from hybrid.errors import ConfigError, Problem
from hybrid.pattern import Pattern

# Largest sizes that are tried. Tensor parallelism stays inside a node; a context parallel rank keeps at least this many
# tokens, since shorter pieces only add messages.
MOST_STAGES = 64
MOST_VIRTUAL = 4
MOST_SAMPLES = 16
LEAST_TOKENS = 4096
# A deeper pipeline only saves memory: this many depths more are tried after one fits without recomputation.
ENOUGH_DEPTHS = 1


@dataclass(frozen=True)
class Candidate:
    """A layout that fits. `overrides` are the settings that differ from those given, by dotted name."""

    overrides: dict[str, Any]
    plan: Plan
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, texts and numbers."""
        return {
            "overrides": self.overrides,
            "reason": self.reason,
            "layout": self.plan.layout,
            "step_seconds": self.plan.step.seconds,
            "parts": self.plan.step.parts,
            "mfu": self.plan.mfu,
            "tokens_per_second_per_gpu": self.plan.tokens_per_second_per_gpu,
            "memory": self.plan.memory.total,
        }


@dataclass(frozen=True)
class Search:
    """What was found: the fastest settings of each layout, fastest first, and what became of the others."""

    candidates: tuple[Candidate, ...]
    tried: int
    refused: int  # against a rule of `hybrid.checks`
    too_large: int
    least_memory: float  # bytes that the smallest of those that were allowed needs

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, texts and numbers."""
        counts = {"tried": self.tried, "refused": self.refused, "too_large": self.too_large}
        candidates = [candidate.as_dict() for candidate in self.candidates]
        return {"candidates": candidates, **counts, "least_memory": self.least_memory}


def search(settings: Settings, gpu: str, world_size: int, limit: int = 10) -> Search:
    """Return layouts of this run on `world_size` GPUs, by predicted step time; the global batch stays as it is.

    Tensor, pipeline (with virtual stages), context and expert sizes, the micro batch and the recomputation are varied,
    each layout with the micro batch that makes it fastest and the least recomputation with which it fits. Raises
    ConfigError if the settings themselves are wrong, or for a GPU without figures.
    """
    device = find_gpu(gpu)
    bare = _with(settings, pipeline=1, tensor=1, context=1, expert=1, sequence=False)
    problems = check(bare)
    if world_size < 1:
        problems.append(Problem("gpus", f"is {world_size}, but a run has at least 1"))
    if problems:
        raise ConfigError(problems)
    best: dict[tuple[int, ...], tuple[Settings, Plan]] = {}
    roomy: Counter[tuple[int, ...]] = Counter()
    tried = refused = too_large = 0
    least = float("inf")
    for layout in _layouts(settings, device, world_size):
        parallel = layout.parallel
        others = (parallel.tensor, parallel.context, parallel.expert)
        if roomy[others] > ENOUGH_DEPTHS:
            continue
        fits_whole = False
        for changed in _variants(layout, world_size):
            tried += 1
            if rules(changed, world_size):
                refused += 1
                continue
            fitting, needed = _fitting(changed, device, world_size)
            least = min(least, needed)
            if fitting is None:
                too_large += 1
                continue
            fits_whole = fits_whole or fitting.trainer.recompute == "none"
            found = evaluate(fitting, device, world_size)
            key = tuple(found.layout.values())
            if key not in best or found.step.seconds < best[key][1].step.seconds:
                best[key] = (fitting, found)
        roomy[others] += fits_whole
    ranked = sorted(best.values(), key=lambda entry: entry[1].step.seconds)[:limit]
    candidates = [
        Candidate(_differences(settings, chosen), found, _reason(found, ranked[0][1])) for chosen, found in ranked
    ]
    return Search(tuple(candidates), tried, refused, too_large, least)


def _layouts(settings: Settings, gpu: Gpu, world_size: int) -> Iterator[Settings]:
    """Settings with every layout, shallow pipelines first."""
    model, length = settings.model, settings.data.sequence_length
    pattern = model.pattern
    experts = model.num_experts if pattern.counts()["E"] and model.num_experts else 1
    for tensor in _divisors(world_size, gpu.per_node):
        for context in _divisors(world_size // tensor, max(1, length // LEAST_TOKENS)):
            for stages in _divisors(world_size // tensor // context, min(MOST_STAGES, pattern.num_layers)):
                shared = world_size // (tensor * stages)
                for expert in (size for size in _divisors(shared, experts) if experts % size == 0):
                    yield _with(
                        settings,
                        tensor=tensor,
                        context=context,
                        pipeline=stages,
                        expert=expert,
                        sequence=tensor > 1,
                        overlap_grad_reduce=shared > 1,
                        overlap_param_gather=shared > 1 and settings.parallel.distributed_optimizer,
                    )


def _variants(layout: Settings, world_size: int) -> Iterator[Settings]:
    """The layout with each cut into virtual stages and each micro batch."""
    trainer = layout.trainer
    replicas = layout.replicas(world_size)
    for cut in _cuts(layout, layout.model.pattern, layout.parallel.pipeline):
        for samples in _micro_batches(trainer.global_batch_size, replicas):
            yield replace(cut, trainer=replace(trainer, micro_batch_size=samples))


def _cuts(settings: Settings, pattern: Pattern, stages: int) -> Iterator[Settings]:
    """The settings with the pattern cut into one and more virtual stages; the user's own cut where it has the size."""
    if stages == 1:
        yield settings
        return
    if len(pattern.segments) > 1 and len(pattern.segments) % stages == 0:
        yield settings
        return
    whole = Pattern((pattern.layers,), pattern.mtp, pattern.mtp_depths)
    for virtual in range(1, MOST_VIRTUAL + 1):
        if stages * virtual > pattern.num_layers:
            return
        text = whole.text if virtual == 1 else pipeline.balanced(settings, whole, stages * virtual).text
        keep = virtual == 1 and len(pattern.segments) == 1
        yield settings if keep else replace(settings, model=replace(settings.model, layer_pattern=text))


def _fitting(settings: Settings, gpu: Gpu, world_size: int) -> tuple[Settings | None, float]:
    """Return the settings with the least recomputation that fits (None: nothing does), and the least bytes needed."""
    needed = float("inf")
    for recompute in ("none", "selective", "full"):
        changed = replace(settings, trainer=replace(settings.trainer, recompute=recompute))
        pattern = pipeline.stage_pattern(changed)
        stages = range(changed.parallel.pipeline)
        worst = max(
            (memory.training(changed, pattern, stage, world_size) for stage in stages), key=lambda held: held.total
        )
        needed = min(needed, worst.total)
        if worst.fits(gpu.memory):
            return changed, needed
    return None, needed


def _reason(found: Plan, best: Plan) -> str:
    """Why a layout is where it is in the ranking: where its time goes, or what it loses to the fastest."""
    room = f"{found.memory.total / hw.GIB:.0f} of {found.capacity / hw.GIB:.0f} GiB"
    if found is best:
        parts = sorted(found.step.parts.items(), key=lambda part: -part[1])
        shares = ", ".join(f"{name} {seconds / found.step.seconds:.0%}" for name, seconds in parts[:3])
        return f"fastest: {shares}; {room}"
    names = found.step.parts.keys() | best.step.parts.keys()
    losses = {name: found.step.parts.get(name, 0.0) - best.step.parts.get(name, 0.0) for name in sorted(names)}
    largest = sorted(losses.items(), key=lambda loss: -loss[1])[:2]
    words = ", ".join(f"{name} +{seconds:.3g} s" for name, seconds in largest if seconds > 1e-3 * best.step.seconds)
    return f"{found.step.seconds / best.step.seconds - 1:+.1%}: {words or 'nearly the same'}; {room}"


def _differences(before: Settings, after: Settings) -> dict[str, Any]:
    """Values of `after` that differ, by dotted name."""
    found: dict[str, Any] = {}
    for section in ("model", "parallel", "trainer"):
        old, new = vars(getattr(before, section)), vars(getattr(after, section))
        found |= {f"{section}.{name}": value for name, value in new.items() if old[name] != value}
    return found


def _with(settings: Settings, **changes: Any) -> Settings:
    return replace(settings, parallel=replace(settings.parallel, **changes))


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _micro_batches(samples: int, replicas: int) -> Iterator[int]:
    """Powers of two that divide what each replica takes of the global batch."""
    size = 1
    while samples % replicas == 0 and size <= MOST_SAMPLES and samples // replicas % size == 0:
        yield size
        size *= 2
