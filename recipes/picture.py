"""A plan as a picture: the layers in order, the memory of each pipeline stage, the parts of a step. SVG, by hand."""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from hybrid import pattern as patterns
from hybrid.costs.hardware import GIB
from hybrid.costs.plan import Plan
from hybrid.errors import ConfigError, Problem, unwritable
from hybrid.pattern import LAYER_KINDS

WIDTH, MARGIN, BAR = 960, 24, 26
# Colours that stay apart for colour-blind readers (Okabe and Ito, 2008).
_LAYERS = {
    "M": "#0072b2",
    "*": "#d55e00",
    "-": "#999999",
    "E": "#009e73",
    "G": "#cc79a7",
    "D": "#e69f00",
    "+": "#f0e442",
}
_PARTS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#f0e442")


def write(plan: Plan, path: Path) -> None:
    """Write the picture of a plan. Raises ConfigError if the file cannot be written there, or would not be an SVG."""
    if path.suffix.lower() != ".svg":
        raise ConfigError(Problem(str(path), f"pictures are written as SVG; call it {path.with_suffix('.svg').name}"))
    try:
        path.write_text(svg(plan), encoding="utf-8")
    except OSError as error:
        raise unwritable(path, "the picture cannot be written", error) from None


def svg(plan: Plan) -> str:
    """The picture of a plan as the text of an SVG file."""
    body: list[str] = []
    top = MARGIN

    def title(text: str) -> None:
        nonlocal top
        body.append(_text(MARGIN, top + 14, text, "bold"))
        top += 24

    title(f"{plan.name} on {plan.world_size} x {plan.gpu}: {plan.parameters.total:,} parameters")
    body += _strip(plan, top)
    top += BAR + 34
    title(f"memory of a GPU, GiB of {plan.capacity / GIB:.1f}, by pipeline stage")
    widest = max(plan.capacity, *(stage.memory.total for stage in plan.stages))
    for stage in plan.stages:
        parts = {name: getattr(stage.memory, name) / GIB for name in stage.memory.__dataclass_fields__}
        body += _bar(parts, top, widest / GIB)
        top += BAR + 4
    line = MARGIN + (WIDTH - 2 * MARGIN) * plan.capacity / widest
    first = top - (BAR + 4) * len(plan.stages)
    body.append(f'<path d="M{line:.1f} {first - 4} V{top}" stroke="#000" stroke-dasharray="4 3"/>')
    body += _legend(list(plan.stages[0].memory.__dataclass_fields__), top)
    top += 40
    title(f"a step of {plan.step.seconds:.3g} s, predicted, by part")
    body += _bar(plan.step.parts, top, plan.step.seconds)
    body += _legend(list(plan.step.parts), top + BAR + 4)
    height = top + BAR + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _strip(plan: Plan, top: int) -> Iterator[str]:
    """The layers in order, coloured by kind, with a gap where a pipeline segment ends."""
    pattern = patterns.parse(plan.pattern)
    columns = pattern.text.split("/")[0] + (f"/{pattern.mtp}" if pattern.mtp else "")
    step = (WIDTH - 2 * MARGIN) / len(columns)
    for column, symbol in enumerate(columns):
        if symbol in _LAYERS:
            left = MARGIN + column * step
            yield f'<rect x="{left:.1f}" y="{top}" width="{step * 0.9:.1f}" height="{BAR}" fill="{_LAYERS[symbol]}"/>'
    left = MARGIN
    for symbol, count in plan.counts.items():
        if count:
            name = f"{count} {LAYER_KINDS[symbol]}"
            yield f'<rect x="{left}" y="{top + BAR + 8}" width="12" height="12" fill="{_LAYERS[symbol]}"/>'
            yield _text(left + 17, top + BAR + 19, name)
            left += 40 + 8 * len(name)


def _bar(parts: Mapping[str, float], top: int, whole: float) -> Iterator[str]:
    left = float(MARGIN)
    for number, (name, size) in enumerate(parts.items()):
        width = (WIDTH - 2 * MARGIN) * size / whole
        colour = _PARTS[number % len(_PARTS)]
        yield (
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{colour}">'
            f"<title>{escape(name)} {size:.3g}</title></rect>"
        )
        if width > 40:
            yield _text(left + 5, top + 17, f"{size:.3g}", colour="#fff")
        left += width


def _legend(names: list[str], top: int) -> Iterator[str]:
    left = MARGIN
    for number, name in enumerate(names):
        yield f'<rect x="{left}" y="{top + 4}" width="12" height="12" fill="{_PARTS[number % len(_PARTS)]}"/>'
        yield _text(left + 17, top + 15, name)
        left += 40 + 8 * len(name)


def _text(left: float, bottom: float, text: str, weight: str = "normal", colour: str = "#000") -> str:
    return f'<text x="{left:.1f}" y="{bottom:.1f}" font-weight="{weight}" fill="{colour}">{escape(text)}</text>'
