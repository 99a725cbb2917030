"""The curves of runs as a picture: PNG, or an HTML page that needs nothing but itself."""

import html
import io
import re
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid import installing
from hybrid.errors import ConfigError, Problem, unwritable
from hybrid.training.folder import METRICS_FILE
from recipes import records, watching

FORMATS = (".png", ".html")

# Points of a curve beyond which neighbours are averaged, and the share of a curve that a smooth one averages over.
_POINTS, _SMOOTH_SHARE = 1500, 0.02
# Metric, title, whether its scale is logarithmic.
_PANELS = (
    ("loss", "loss (nats a token)", False),
    ("grad_norm", "gradient norm", True),
    ("lr", "learning rate", False),
    ("tokens_per_second", "tokens/s", False),
)
_BITS, _LOSS = "_bits_per_byte", "_loss"


@dataclass
class Curves:
    """What a run has recorded: (steps, values) of each metric, and of each validation set's loss and bits per byte."""

    name: str
    metrics: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)

    def last(self, metric: str) -> float | None:
        """The newest value of a metric."""
        return self.metrics[metric][1][-1] if metric in self.metrics else None

    def validations(self) -> list[str]:
        """Names of the held-out sets."""
        return [name.removesuffix(_BITS) for name in self.metrics if name.endswith(_BITS)]


def read(folder: Path) -> Curves:
    """The curves of the run in a folder of this machine. Raises ConfigError if nothing is recorded yet."""
    record = records.read(folder)
    if record is not None and record.ssh:
        text = records.ask(record, f"cat {shlex.quote(METRICS_FILE)} 2>/dev/null").decode(errors="replace")
    else:
        path = folder / METRICS_FILE
        text = path.read_text() if path.is_file() else ""
    curves = Curves(folder.name)
    for entry in watching.entries(text):
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = curves.metrics.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    if "loss" not in curves.metrics:
        raise ConfigError(Problem(str(folder), "no step is recorded yet, so there is nothing to draw"))
    return curves


def draw(runs: Sequence[Curves], path: Path) -> None:
    """Draw the curves of some runs into one picture. Raises ConfigError for a format or a package that is not there."""
    if path.suffix not in FORMATS:
        raise ConfigError(Problem("--output", f"'{path}' is no {' or '.join(FORMATS)} file"))
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            Problem("plot", f"needs matplotlib, which is not installed here; `{installing.command('matplotlib')}`")
        ) from None
    matplotlib.use("agg")
    figure = _figure(runs)
    try:
        if path.suffix == ".png":
            figure.savefig(path, dpi=150)
        else:
            path.write_text(_page(runs, figure))
    except OSError as error:
        raise unwritable(path, "cannot be written", error, "--output names another file") from None


def _figure(runs: Sequence[Curves]) -> Any:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for axes, (metric, title, logarithmic) in zip(panels.flat, _PANELS, strict=True):
        for number, run in enumerate(runs):
            if metric not in run.metrics:
                continue
            color = f"C{number % 10}"
            steps, values = _thin(*run.metrics[metric])
            smooth = values if metric == "lr" else _smooth(values)  # it has no noise, and a warm-up that would be bent
            if smooth is not values:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth, color=color, linewidth=1.6, label=run.name)
            if metric == "loss":
                for style, name in zip(("o", "s", "^", "D", "v"), run.validations(), strict=False):
                    points = run.metrics[f"{name}{_LOSS}"]
                    axes.plot(
                        *points, style, color=color, markersize=5, markeredgecolor="white", label=_label(run, name)
                    )
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        if metric == "tokens_per_second":
            axes.set_ylim(bottom=0)
    panels.flat[0].legend(frameon=False, fontsize=9, title="bold: mean of neighbouring steps", title_fontsize=8)
    return figure


def _label(run: Curves, name: str) -> str:
    bits = run.last(f"{name}{_BITS}")
    return f"{run.name}, {name} ({bits:.3f} bits/byte)"


def _thin(steps: list[int], values: list[float]) -> tuple[list[float], list[float]]:
    """At most `_POINTS` points, each the mean of its neighbours."""
    width = -(-len(values) // _POINTS)
    if width == 1:
        return [float(step) for step in steps], values
    parts = range(0, len(values), width)
    return (
        [statistics.fmean(steps[part : part + width]) for part in parts],
        [statistics.fmean(values[part : part + width]) for part in parts],
    )


def _smooth(values: list[float]) -> list[float]:
    """Means over the neighbours of each value; the values themselves where there are few."""
    reach = int(len(values) * _SMOOTH_SHARE)
    if reach < 1:
        return values
    return [statistics.fmean(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]


def _page(runs: Sequence[Curves], figure: Any) -> str:
    """One page: the picture as SVG, and a table of the newest values."""
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = re.sub(r"^.*?(?=<svg)", "", picture.getvalue(), flags=re.DOTALL)
    sets = list(dict.fromkeys(name for run in runs for name in run.validations()))
    head = ["run", "steps", "loss", *(f"{name}, bits/byte" for name in sets), "tokens/s, median"]
    rows = [
        [
            run.name,
            f"{run.metrics['loss'][0][-1]:,}",
            f"{run.last('loss'):.4f}",
            *(f"{bits:.3f}" if (bits := run.last(f"{name}{_BITS}")) is not None else "" for name in sets),
            f"{statistics.median(run.metrics['tokens_per_second'][1]):,.0f}"
            if "tokens_per_second" in run.metrics
            else "",
        ]
        for run in runs
    ]
    table = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in [("th", head), *(("td", row) for row in rows)]
    )
    title = html.escape(", ".join(run.name for run in runs))
    style = (
        "body{font:15px system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em}svg{width:100%;height:auto}"
        "table{border-collapse:collapse;margin:1em 0}"
        "td,th{padding:.3em .9em;border-bottom:1px solid #ddd;text-align:right}"
        "td:first-child,th:first-child{text-align:left}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head>"
        f"<body><h1>{title}</h1><table>{table}</table>{svg}</body></html>\n"
    )
