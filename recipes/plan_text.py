"""Plans and searches as text."""

import shlex
from collections.abc import Callable, Iterator
from itertools import groupby

from hybrid import checks
from hybrid.costs.hardware import GIB
from hybrid.costs.plan import Plan, Stage
from hybrid.costs.search import Search
from hybrid.pattern import CONVERTED, LAYER_KINDS
from recipes.planning import Planned

Paint = Callable[[str, str], str]
_INDENT = " " * 14


def plan_text(planned: Planned, paint: Paint = lambda text, role: text) -> str:
    """What `hybrid plan` prints. `paint(text, role)` may colour a piece; roles are "section" and "doc"."""
    plan = planned.plan
    lines = [paint(f"{plan.name} on {plan.world_size} x {plan.gpu}", "section") + f": {_layout(plan)}"]
    for title, body in (
        ("layers", _layers(plan)),
        ("parameters", _parameters(plan)),
        ("operations", _operations(plan)),
        ("memory", _memory(plan)),
        ("inference", _inference(plan)),
        ("messages", _messages(plan)),
        ("pipeline", _pipeline(plan)),
        ("step", _step(plan)),
        ("run", _run(plan) if checks.NO_LENGTH not in planned.problems else ()),
    ):
        for number, line in enumerate(body):
            head = paint(f"{title:<{len(_INDENT)}}", "section") if number == 0 else _INDENT
            lines.append((head + line).rstrip())
    if planned.note:
        lines.append(f"{'note':<{len(_INDENT)}}{planned.note}")
    if planned.problems:
        lines.append(paint("to be settled before it can run", "section"))
        lines += [f"  {problem}" for problem in planned.problems]
    return "\n".join(lines)


def search_text(found: Search, paint: Paint = lambda text, role: text) -> str:
    """What `hybrid plan --search` prints: the layouts that fit, and what became of the others."""
    lines = []
    for number, candidate in enumerate(found.candidates, start=1):
        plan = candidate.plan
        lines.append(
            paint(f"{number:>2}. {_seconds(plan.step.seconds)} a step", "section")
            + f", MFU {plan.mfu:.0%}, {plan.memory.total / GIB:.1f} GiB: {_layout(plan)}"
        )
        changes = shlex.join(f"{name}={value}" for name, value in candidate.overrides.items())
        lines.append(f"    {candidate.reason}")
        lines.append(f"    {changes or 'the recipe as it is'}")
    if not found.candidates:
        lines.append(
            f"no layout fits: the smallest needs {found.least_memory / GIB:.1f} GiB a GPU; "
            f"take more GPUs, larger ones, or optimizer.precision_aware=true"
        )
    lines.append(f"{found.tried} settings tried, {found.refused} against a rule, {found.too_large} too large")
    return "\n".join(lines)


def _layout(plan: Plan) -> str:
    sizes = [f"{name} {size}" for name, size in plan.layout.items() if size > 1 or name == "data"]
    return f"{', '.join(sizes)}; {plan.micro_batches} micro batch{'es' if plan.micro_batches > 1 else ''} a step"


def _layers(plan: Plan) -> Iterator[str]:
    total = sum(plan.counts.values())
    kinds = [f"{count} {LAYER_KINDS[symbol]} ({count / total:.0%})" for symbol, count in plan.counts.items() if count]
    yield f"{total}: {', '.join(kinds)}"
    yield from plan.strip.splitlines()


def _parameters(plan: Plan) -> Iterator[str]:
    whole = plan.parameters
    yield f"{whole.total:,}, of these {whole.non_embedding:,} non-embedding"
    if plan.active_parameters != whole.total:
        yield f"{plan.active_parameters:,} active for a token"
    named = {
        "embedding": whole.embedding,
        **{LAYER_KINDS[symbol]: count for symbol, count in whole.layers.items() if count},
        "MTP": whole.mtp,
        "norm": whole.final_norm,
        "output": whole.output,
    }
    yield ", ".join(f"{name} {count:,}" for name, count in named.items() if count)


def _operations(plan: Plan) -> Iterator[str]:
    flops = plan.flops
    yield (f"{_giga(flops.total)} per token: {_giga(flops.forward)} forward, {_giga(flops.backward)} backward")
    shares = {LAYER_KINDS.get(name, name): part / flops.forward for name, part in flops.parts.items()}
    yield ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def _memory(plan: Plan) -> Iterator[str]:
    held = plan.memory
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    where = " on the fullest pipeline stage" if len(plan.stages) > 1 else ""
    yield f"{_gib(held.total)} of {plan.capacity / GIB:.1f} GiB per GPU{where}: {verdict}"
    parts = {name: getattr(held, name) for name in held.__dataclass_fields__}
    if shares := [f"{name} {size / GIB:.1f}" for name, size in parts.items() if size >= 0.05 * GIB]:
        yield ", ".join(shares)


def _inference(plan: Plan) -> Iterator[str]:
    needed = plan.inference
    if unknown := [symbol for symbol, count in plan.counts.items() if count and symbol not in CONVERTED]:
        yield f"none: generation does not know {', '.join(unknown)}"
        return
    yield (
        f"weights {_bytes(needed.weights)}, and per sequence {_bytes(needed.state_per_sequence)} of SSM state "
        f"and {_bytes(needed.cache_per_token)} of keys and values per token"
    )


def _messages(plan: Plan) -> Iterator[str]:
    """Of the stage that sends most, by axis."""
    worst = max(plan.stages, key=lambda stage: sum(axis.bytes for axis in stage.communication.values()))
    axes = [f"{name} {_bytes(axis.bytes)}" for name, axis in worst.communication.items()]
    yield f"sent by a GPU in a step: {', '.join(axes)}" if axes else "none: one GPU"


def _pipeline(plan: Plan) -> Iterator[str]:
    if len(plan.stages) == 1:
        return
    yield f"{len(plan.stages)} stages, which wait for each other {plan.step.bubble:.0%} of the time"

    def same(numbered: tuple[int, Stage]) -> tuple[object, ...]:
        stage = numbered[1]
        return stage.layers, stage.parameters.total, stage.memory.total

    for _, members in groupby(enumerate(plan.stages), key=same):
        together = list(members)
        first, last, stage = together[0][0], together[-1][0], together[0][1]
        seconds = max(stage.compute_seconds, stage.launch_seconds)
        yield (
            f"stage {first if first == last else f'{first}-{last}'}: {' '.join(stage.layers)}, "
            f"{stage.parameters.total:,} parameters, {stage.memory.total / GIB:.1f} GiB, "
            f"{_seconds(seconds)} a micro batch"
        )


def _step(plan: Plan) -> Iterator[str]:
    how = f"at the stated MFU of {plan.stated_mfu:.0%}" if plan.stated_mfu else f"predicted, MFU {plan.mfu:.0%}"
    yield f"{_seconds(plan.step_seconds)} {how}; {plan.tokens_per_second_per_gpu:,.0f} tokens/s per GPU"
    if not plan.stated_mfu:
        parts = sorted(plan.step.parts.items(), key=lambda part: -part[1])
        shares = [(name, seconds / plan.step.seconds) for name, seconds in parts]
        yield ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)


def _run(plan: Plan) -> Iterator[str]:
    size = f"{plan.steps:,} steps of {'up to ' if plan.batches < plan.steps else ''}{plan.tokens_per_step:,} tokens"
    yield f"{size}: {plan.samples:,} samples, {_large(plan.tokens)} tokens"
    yield f"{_duration(plan.seconds)}, {plan.gpu_hours:,.1f} GPU-hours"


def _giga(operations: float) -> str:
    return f"{operations / 1e9:,.2f} GFLOP" if operations >= 1e8 else f"{operations / 1e6:,.2f} MFLOP"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.05 * GIB else _bytes(size)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if size % 1 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def _large(count: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= limit:
            return f"{count / limit:,.1f}{unit}"
    return f"{count:,.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172_800 else f"{seconds / 86_400:,.1f} days"
