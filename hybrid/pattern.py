"""The layer-pattern language: `M-M*-M-|M-M*-E-/M*/M*`.

One symbol is one layer with its own norm and residual; `|` ends a pipeline segment; each `/` adds one depth of
multi-token prediction (MTP), and all depths repeat the same layers. The symbols are megatron-core's
(`megatron/core/models/hybrid/hybrid_layer_allocation.py`).

Stricter than megatron-core, which takes the following without a word: an empty pattern, a segment without layers
(`M-||M-`), a `/` with nothing after it (it then builds no MTP at all), MTP without main layers, and `*` in the main
layers with `D` or `+` in the MTP depths (the two parts are checked apart, one model is built from both).
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from hybrid.errors import ConfigError, Problem

LAYER_KINDS = {
    "M": "Mamba",
    "*": "attention",
    "-": "MLP",
    "E": "MoE",
    "G": "gated delta net",
    "D": "sparse attention (DSA)",
    "+": "latent attention (MLA)",
}
# What converters and generation know; the others can be trained.
CONVERTED = "M*-E+"
PLACE = "model.layer_pattern"
EXAMPLE = "M-M*-M-"
# Far beyond any model; keeps a slip of the hand from filling the memory.
MOST_LAYERS = 10_000

# What word processors, other notations and a missed Shift key make of the symbols.
_MEANT = dict.fromkeys("–—−_", "-") | dict.fromkeys("∗×xXA", "*") | dict.fromkeys("│¦!", "|") | {"\\": "/"}


@dataclass(frozen=True)
class Pattern:
    """A layer pattern that is right. Made by `parse`, `from_ratios`, `settle` and `split`.

    `segments` are the main layers, cut at `|`; with pipeline parallel size P and more segments than P, segment i is
    the virtual stage i // P of rank i % P. `mtp` are the layers of one MTP depth ('' if there is none).
    """

    segments: tuple[str, ...]
    mtp: str = ""
    mtp_depths: int = 0

    @property
    def layers(self) -> str:
        """Main layers in order, without `|`."""
        return "".join(self.segments)

    @property
    def num_layers(self) -> int:
        """Main layers; those of the MTP depths are not among them."""
        return sum(map(len, self.segments))

    @property
    def text(self) -> str:
        """The pattern as it is written; `parse(pattern.text) == pattern`."""
        return "|".join(self.segments) + f"/{self.mtp}" * self.mtp_depths

    def __str__(self) -> str:
        return self.text

    def counts(self, include_mtp: bool = True) -> dict[str, int]:
        """Layers of each kind, by symbol, for every symbol there is (0 where the pattern has none)."""
        layers = self.layers + (self.mtp * self.mtp_depths if include_mtp else "")
        return {symbol: layers.count(symbol) for symbol in LAYER_KINDS}

    def ratios(self) -> dict[str, float]:
        """Share of each kind among the main layers, by symbol: what the ratios asked for came to."""
        return {symbol: count / self.num_layers for symbol, count in self.counts(include_mtp=False).items()}


def parse(text: str) -> Pattern:
    """Return the pattern that `text` says. Raises ConfigError with everything that is wrong in it."""
    main, *depths = text.split("/")
    problems = [*_unknown_symbols(text, len(main)), *_empty_parts(text, main, depths), *_mixed_attention(text)]
    different = [number for number, depth in enumerate(depths, start=1) if depth != depths[0]]
    if different and all(depths) and "|" not in "".join(depths):
        names = " and ".join(f"'{depth}'" for depth in dict.fromkeys(depths))
        problems.append(
            _problem(
                f"the MTP depths after '/' must repeat the same layers, these are {names}; "
                f"write '{'/'.join([main, *depths[:1] * len(depths)])}'"
            )
        )
    if problems:
        raise ConfigError(problems)
    return Pattern(tuple(main.split("|")), depths[0] if depths else "", len(depths))


def from_ratios(num_layers: int, attention_ratio: float = 0.0, mlp_ratio: float = 0.0) -> str:
    """Return the pattern of `num_layers` layers with these shares of attention and MLP layers; the rest are Mamba.

    The allocator of the 2024 hybrid example (megatron-core's `pattern_from_ratios`): attention layers are spaced
    evenly over all layers so that the pattern starts and ends with another kind, then MLP layers evenly over those
    left. Shares are rounded to whole layers, halves to even.
    """
    assert num_layers > 0 and attention_ratio >= 0 and mlp_ratio >= 0 and attention_ratio + mlp_ratio <= 1
    layers = ["M"] * num_layers
    attention = round(num_layers * attention_ratio)
    for place in _evenly(range(num_layers), (num_layers - attention) / (attention + 1)):
        layers[place] = "*"
    mlp = round(num_layers * mlp_ratio)
    if mlp:
        free = [place for place, symbol in enumerate(layers) if symbol == "M"]
        for place in _evenly(free, (num_layers - attention - mlp) / mlp):
            layers[place] = "-"
    return "".join(layers)


@lru_cache(maxsize=1024)
def settle(
    layer_pattern: str | None, num_layers: int | None, attention_ratio: float | None, mlp_ratio: float | None
) -> Pattern:
    """Return the pattern of a model: `layer_pattern` if there is one, else the one made from the ratios.

    An explicit pattern wins over the ratios, which are then unused. Raises ConfigError with every problem: a wrong
    pattern, `num_layers` other than the pattern's, neither of them, ratios out of range or of a sum above 1.
    """
    if layer_pattern is not None:
        pattern = parse(layer_pattern)
        if num_layers is not None and num_layers != pattern.num_layers:
            raise ConfigError(
                Problem(
                    "model.num_layers",
                    f"is {num_layers}, but {PLACE} '{pattern}' has {pattern.num_layers} layers"
                    f"{' (MTP layers do not count)' if pattern.mtp else ''}; leave model.num_layers out, "
                    f"or set {PLACE}=None to make a pattern of {num_layers} layers from the ratios",
                )
            )
        return pattern
    problems: list[Problem] = []
    if num_layers is None:
        problems.append(
            _problem(f"is not set; write a pattern such as '{EXAMPLE}', or set model.num_layers and the ratios")
        )
    elif not 1 <= num_layers <= MOST_LAYERS:
        problems.append(Problem("model.num_layers", f"is {num_layers}, but a model has 1 to {MOST_LAYERS} layers"))
    ratios = {"model.attention_ratio": attention_ratio or 0.0, "model.mlp_ratio": mlp_ratio or 0.0}
    problems += [
        Problem(place, f"is {ratio}, but a share of the layers lies between 0 and 1")
        for place, ratio in ratios.items()
        if not 0 <= ratio <= 1
    ]
    total = sum(ratios.values())
    # 0.9 + 0.1 is 1.0 in floating point, 0.7 + 0.2 + 0.1 is not; a sum that misses 1 by rounding is meant as 1.
    if not problems and total > 1 + 1e-9:
        problems.append(
            Problem(
                "model.mlp_ratio",
                f"is {mlp_ratio} and model.attention_ratio is {attention_ratio}: together {total:g}, above 1; "
                f"with this attention_ratio, mlp_ratio is at most {1 - ratios['model.attention_ratio']:g}",
            )
        )
    if problems:
        raise ConfigError(problems)
    assert num_layers is not None
    attention, mlp = ratios.values()
    return Pattern((from_ratios(num_layers, attention, min(mlp, 1 - attention) if total > 1 else mlp),))


def split(pattern: Pattern, stages: int, costs: Mapping[str, float], first: float = 0.0, last: float = 0.0) -> Pattern:
    """Return `pattern` cut into `stages` segments so that the most expensive one costs as little as possible.

    `costs` is the cost of one layer by symbol, `first` what the first segment carries besides its layers (embedding),
    `last` the last one (output layer, loss, MTP). Among all cuts of the same greatest cost, the most even one is taken
    (least sum of squares). Every segment gets at least one layer: `stages` may not exceed `pattern.num_layers`.
    Segments that the pattern already has are dissolved.
    """
    layers = pattern.layers
    assert 1 <= stages <= len(layers)
    sizes = balance(tuple(costs[symbol] for symbol in layers), stages, first, last)
    ends = [0, *accumulate(sizes)]
    segments = tuple(layers[start:end] for start, end in pairwise(ends))
    return Pattern(segments, pattern.mtp, pattern.mtp_depths)


@lru_cache(maxsize=4096)
def balance(costs: tuple[float, ...], parts: int, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """Return how many of the consecutive `costs` each of `parts` parts takes; see `split`. Exact, O(n^2 parts)."""
    greatest, _ = _best_cut(costs, parts, first, last, limit=float("inf"), power=None)
    # The limit is met by sums formed in another order too, hence the rounding allowance.
    _, sizes = _best_cut(costs, parts, first, last, limit=greatest * (1 + 1e-12), power=2)
    return sizes


def strip(pattern: Pattern, width: int = 100) -> str:
    """Return the pattern as a picture in text: a lane per layer kind, a ruler of layer numbers, `│` where segments end.

    Lines are at most `width` characters; a long pattern goes on in a second band. `╱` starts the MTP layers, which are
    drawn once; their depths are written beside the lane's name.
    """
    counts = pattern.counts()
    names = {symbol: f"{symbol} {LAYER_KINDS[symbol]} x{counts[symbol]}" for symbol in LAYER_KINDS if counts[symbol]}
    margin = max(map(len, names.values())) + 1
    columns = pattern.text.split("/")[0] + (f"/{pattern.mtp}" if pattern.mtp else "")
    ruler = _ruler(columns)
    room = max(10, width - margin)
    bands: list[str] = []
    for start in range(0, len(columns), room):
        part = columns[start : start + room]
        lines = [" " * margin + ruler[start : start + room]]
        lines += [
            f"{name:<{margin}}" + "".join({symbol: "█", "|": "│", "/": "╱"}.get(column, "·") for column in part)
            for symbol, name in names.items()
        ]
        bands.append("\n".join(line.rstrip() for line in lines))
    if pattern.mtp_depths > 1:
        bands.append(f"the layers after ╱ are repeated for {pattern.mtp_depths} depths")
    return "\n\n".join(bands)


def _problem(message: str, detail: str = "") -> Problem:
    return Problem(PLACE, message, detail)


def _unknown_symbols(text: str, main_length: int) -> list[Problem]:
    """Problems of symbols that are none, and of `|` after the first `/`; each with a caret under every one of them."""
    known = {*LAYER_KINDS, "|", "/"}
    wrong = [place for place, symbol in enumerate(text) if symbol not in known]
    pipes = [place for place, symbol in enumerate(text) if symbol == "|" and place > main_length]
    problems: list[Problem] = []
    if wrong:
        symbols = list(dict.fromkeys(text[place] for place in wrong))
        guesses = {symbol: guess for symbol in symbols if (guess := _MEANT.get(symbol) or _upper(symbol))}
        hint = "".join(
            f"; for {symbol!r} write '{guess}' if {LAYER_KINDS.get(guess, 'a border')} is meant"
            for symbol, guess in guesses.items()
        )
        meanings = ", ".join(f"{symbol} {name}" for symbol, name in LAYER_KINDS.items())
        what = "is no layer symbol" if len(symbols) == 1 else "are no layer symbols"
        problems.append(
            _problem(
                f"{', '.join(map(repr, symbols))} {what}{hint}; the symbols are {meanings}, "
                "| end of a pipeline segment, / MTP depth",
                carets(text, wrong),
            )
        )
    if pipes:
        problems.append(
            _problem("MTP layers (after '/') all belong to the last segment, take the '|' out", carets(text, pipes))
        )
    return problems


def _upper(symbol: str) -> str:
    return symbol.upper() if symbol.upper() in LAYER_KINDS else ""


def carets(text: str, places: Iterable[int]) -> str:
    """Return `text` and below it a line with a caret under each of `places`, aligned in a terminal."""
    marked = set(places)
    shown, below = "  ", "  "
    for place, symbol in enumerate(text):
        shown += symbol if symbol.isprintable() else "�"
        cells = 2 if unicodedata.east_asian_width(symbol) in "WF" else 0 if unicodedata.combining(symbol) else 1
        below += ("^" if place in marked else " ") * cells
    return f"{shown}\n{below.rstrip()}"


def _empty_parts(text: str, main: str, depths: Sequence[str]) -> list[Problem]:
    if not text:
        return [_problem(f"is empty; write a pattern such as '{EXAMPLE}'")]
    problems: list[Problem] = []
    if not main:
        problems.append(_problem("has no layers before '/': MTP needs a main model"))
    elif "" in main.split("|"):
        problems.append(_problem(f"has a pipeline segment without layers: '{main}'; every segment holds at least one"))
    if "" in depths:
        problems.append(
            _problem(f"has a '/' without layers after it: '{text}'; write the layers of the MTP depth or take it out")
        )
    return problems


def _mixed_attention(text: str) -> list[Problem]:
    others = [symbol for symbol in "D+" if symbol in text]
    if "*" not in text or not others:
        return []
    names = " and ".join(f"'{symbol}' {LAYER_KINDS[symbol]}" for symbol in others)
    return [_problem(f"mixes '*' attention with {names}, which megatron-core cannot build in one model; keep one kind")]


def _evenly(places: Sequence[int], gap: float) -> list[int]:
    """Return the members of `places` that come after every `gap` others, the distance carried over as a fraction."""
    taken: list[int] = []
    left = gap
    for place in places:
        if left < 0.5:
            taken.append(place)
            left += gap
        else:
            left -= 1
    return taken


def _best_cut(
    costs: Sequence[float], parts: int, first: float, last: float, limit: float, power: int | None
) -> tuple[float, tuple[int, ...]]:
    """Return the best (objective, sizes) of cutting `costs` into `parts` non-empty parts of at most `limit` each.

    The objective is the greatest part (`power` None) or the sum of the parts' powers. Dynamic programming over
    (part, end): best[end] is the objective of the parts so far when they cover costs[:end].
    """
    n = len(costs)
    ends = [0.0, *accumulate(costs)]
    infinity = float("inf")
    best = [0.0] + [infinity] * n
    starts: list[list[int]] = []
    for part in range(parts):
        extra = (first if part == 0 else 0.0) + (last if part == parts - 1 else 0.0)
        new, start_of = [infinity] * (n + 1), [0] * (n + 1)
        for end in range(part + 1, n - (parts - 1 - part) + 1):
            for start in range(end - 1, part - 1, -1):
                cost = ends[end] - ends[start] + extra
                if cost > limit or (power is None and cost >= new[end]):
                    break  # taking still more layers only makes this part dearer
                total = max(best[start], cost) if power is None else best[start] + cost**power
                if total < new[end]:
                    new[end], start_of[end] = total, start
        best = new
        starts.append(start_of)
    sizes: list[int] = []
    end = n
    for start_of in reversed(starts):
        sizes.append(end - start_of[end])
        end = start_of[end]
    return best[n], tuple(reversed(sizes))


def _ruler(columns: str) -> str:
    """Layer numbers over the columns of a strip: 1, then every tenth layer, written from its column on."""
    line = [" "] * (len(columns) + 8)
    number = 0
    for column, symbol in enumerate(columns):
        if symbol in "|/":
            if symbol == "/":
                break
            continue
        number += 1
        if number == 1 or number % 10 == 0:
            line[column : column + len(str(number))] = str(number)
    return "".join(line)[: len(columns) + 3]
