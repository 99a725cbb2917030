"""What a recipe says, field by field: for people, and for programs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrid.config import Settings
from hybrid.costs import parameters
from recipes import nodes, registry
from recipes.origins import origin, part_of
from recipes.settle import check, settings, settle

if TYPE_CHECKING:
    import fiddle as fdl

# Where a field is None, the value that follows from the others.
_DERIVED: dict[str, Callable[[Settings], Any]] = {
    "model.layer_pattern": lambda it: it.model.pattern.text,
    "model.num_layers": lambda it: it.model.pattern.num_layers,
    "model.ffn_hidden_size": lambda it: it.model.ffn_size,
    "model.num_query_groups": lambda it: it.model.query_groups,
    "model.attention_head_dim": lambda it: it.model.head_dim,
    "model.mamba_num_heads": lambda it: it.model.mamba_heads,
    "model.mamba_dt_rank": lambda it: it.model.dt_rank,
    "model.moe_ffn_hidden_size": lambda it: it.model.moe_ffn_size,
    "optimizer.warmup_samples": lambda it: it.warmup_samples,
    "optimizer.decay_samples": lambda it: it.trainer.samples,
    "trainer.max_steps": lambda it: it.trainer.steps,
    "trainer.max_samples": lambda it: it.trainer.samples,
}


@dataclass(frozen=True)
class Row:
    """One field of a recipe. `derived` is the value that a None stands for, None if it stands for nothing."""

    place: str
    value: Any
    derived: Any
    doc: str
    unit: str
    is_default: bool
    origin: str

    @property
    def shown(self) -> str:
        """The value in words, with what it stands for."""
        return str(self.value) if self.derived is None else f"None -> {self.derived}"


def rows(recipe: "fdl.Partial[Any]") -> list[Row]:
    """Every field of the settled recipe, in order. Raises ConfigError for a recipe that cannot be settled."""
    recipe = settle(recipe)
    built = settings(recipe)
    found: list[Row] = []
    for name, field in nodes.node_schema(recipe).items():
        if field.section is None:
            found.append(_row(built, name, field, nodes.value(recipe, name), origin(recipe, name)))
            continue
        section = nodes.value(recipe, name)
        via = part_of(recipe, name)
        found += [
            _row(built, f"{name}.{inner}", inner_field, nodes.value(section, inner), origin(section, inner, via))
            for inner, inner_field in nodes.node_schema(section).items()
        ]
    return found


def facts(recipe: "fdl.Partial[Any]", origins: bool = False) -> dict[str, Any]:
    """The settled recipe as plain data.

    `config` by section, under `derived` what its Nones stand for, under `problems` what keeps it from running, and on
    request under `origins` where each value was set.
    """
    config: dict[str, Any] = {}
    found = rows(recipe)
    for row in found:
        section, _, name = row.place.rpartition(".")
        (config.setdefault(section, {}) if section else config)[name] = row.value
    answer = {
        "task": recipe.__fn_or_cls__.__name__,
        "config": config,
        "derived": {row.place: row.derived for row in found if row.derived is not None},
        "problems": [{"place": problem.place, "message": problem.message} for problem in check(recipe)],
    }
    if origins:
        answer["origins"] = {row.place: row.origin for row in found}
    return answer


def diff(before: "fdl.Partial[Any]", after: "fdl.Partial[Any]") -> list[tuple[Row, Row]]:
    """The fields in which two recipes differ once they are settled, in order."""
    return [(old, new) for old, new in zip(rows(before), rows(after), strict=True) if old.value != new.value]


def diff_text(before: "fdl.Partial[Any]", after: "fdl.Partial[Any]") -> str:
    """The differences of two recipes as text, a line per field."""
    pairs = diff(before, after)
    tasks = before.__fn_or_cls__.__name__, after.__fn_or_cls__.__name__
    lines = [("task", *tasks)] if tasks[0] != tasks[1] else []
    lines += [(old.place, old.shown, new.shown) for old, new in pairs]
    if not lines:
        return "no difference"
    width = max(len(place) for place, _, _ in lines)
    return "\n".join(
        f"{place:<{width}}  {old} => {new}"
        if len(old) + len(new) < 80
        else f"{place:<{width}}  {old}\n{'':<{width - 1}}=> {new}"
        for place, old, new in lines
    )


def models() -> list[dict[str, Any]]:
    """The models of the catalogue, which `model=NAME` puts into any recipe: their sizes and layers."""
    found = []
    for entry in registry.entries().values():
        built = settings(entry.function())
        pattern = built.model.pattern
        found.append(
            {
                "name": entry.name,
                "parameters": parameters.whole(built).total,
                "hidden_size": built.model.hidden_size,
                "layers": {symbol: count for symbol, count in pattern.counts().items() if count},
                "mamba_version": built.model.mamba_version if "M" in pattern.layers else None,
            }
        )
    return found


def tree(
    recipe: "fdl.Partial[Any]", paint: Callable[[str, str], str] = lambda text, role: text, origins: bool = False
) -> str:
    """The settled recipe as text: a line per field with its value, its meaning and its unit, or where it was set.

    `paint(text, role)` may colour a piece; roles are "section", "set", "default" and "doc".
    """
    lines = [paint(f"{nodes.value(recipe, 'name')} ({recipe.__fn_or_cls__.__name__})", "section")]
    last_section = ""
    for row in rows(recipe):
        section, _, name = row.place.rpartition(".")
        if not section:
            continue
        if section != last_section:
            lines.append(paint(section, "section"))
            last_section = section
        doc = f"{row.doc} [{row.unit}]" if row.unit and row.unit not in row.doc else row.doc
        remark = paint(row.origin if origins else doc, "doc")
        role = "default" if row.is_default else "set"
        if len(row.shown) <= 22:
            lines.append(f"  {name:<24}{paint(f'{row.shown:<22}', role)}  {remark}")
        else:
            lines.append(f"  {name:<24}{paint(row.shown, role)}")
            lines.append(f"  {'':<46}  {remark}")
    if problems := check(recipe):
        lines.append(paint("to be settled before it can run", "section"))
        lines += [f"  {problem}" for problem in problems]
    return "\n".join(lines)


def _row(built: Settings, place: str, field: nodes.Field, value: Any, origin: str) -> Row:
    derived = _DERIVED[place](built) if value is None and place in _DERIVED else None
    return Row(place, value, derived, field.doc, field.unit, value == field.default, origin)
