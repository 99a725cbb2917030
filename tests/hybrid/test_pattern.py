import importlib.util
import itertools
import random
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid import pattern as patterns
from hybrid.errors import ConfigError

KINDS = "".join(patterns.LAYER_KINDS)
# Of the kinds of attention one alone: they do not go together.
layer_rows = st.text(KINDS.translate(str.maketrans("", "", "D+")), min_size=1, max_size=12)
right_patterns = st.builds(
    lambda segments, mtp, depths: "|".join(segments) + f"/{mtp}" * depths,
    st.lists(layer_rows, min_size=1, max_size=5),
    layer_rows,
    st.integers(0, 3),
)


def upstream():
    """megatron-core's own module, loaded alone: its package takes 10 s to import and the functions need none of it."""
    root = importlib.util.find_spec("megatron.core")
    assert root and root.submodule_search_locations
    path = Path(next(iter(root.submodule_search_locations))) / "models/hybrid/hybrid_layer_allocation.py"
    spec = importlib.util.spec_from_file_location("upstream_layer_allocation", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    utils = types.ModuleType("megatron.core.utils")
    utils.log_on_each_pipeline_stage = utils.log_single_rank = lambda *_, **__: None  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "megatron.core.utils", utils)
        spec.loader.exec_module(module)
    return module


def problems_of(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return caught.value.problems


class TestParse:
    def test_segments_mtp_and_counts(self):
        pattern = patterns.parse("M-M*|M-E/M*/M*")
        assert pattern.segments == ("M-M*", "M-E")
        assert (pattern.mtp, pattern.mtp_depths) == ("M*", 2)
        assert (pattern.layers, pattern.num_layers) == ("M-M*M-E", 7)
        assert pattern.counts() == {"M": 5, "*": 3, "-": 2, "E": 1, "G": 0, "D": 0, "+": 0}
        assert pattern.counts(include_mtp=False)["M"] == 3
        assert pattern.ratios()["*"] == pytest.approx(1 / 7)

    @given(right_patterns)
    def test_text_reads_back(self, text):
        pattern = patterns.parse(text)
        assert str(pattern) == text
        assert patterns.parse(pattern.text) == pattern

    @given(st.text(KINDS + "|/ mx\t日", max_size=20))
    def test_any_text_is_a_pattern_or_a_config_error(self, text):
        try:
            assert patterns.parse(text).text == text
        except ConfigError as error:
            assert all(problem.place == "model.layer_pattern" for problem in error.problems)

    @given(st.text(KINDS + "|/", max_size=16))
    def test_what_is_taken_means_the_same_upstream(self, text):
        try:
            pattern = patterns.parse(text)
        except ConfigError:
            return
        parsed = UPSTREAM.parse_hybrid_pattern(text)
        assert parsed.main_pattern == "|".join(pattern.segments)
        assert (parsed.mtp_pattern or "", parsed.mtp_num_depths) == (pattern.mtp, pattern.mtp_depths)
        assert UPSTREAM.get_hybrid_layer_counts(text) == pattern.counts()

    def test_carets_stand_under_every_unknown_symbol(self):
        (problem,) = problems_of(patterns.parse, "M-x*-m")
        assert problem.detail.splitlines() == ["  M-x*-m", "    ^  ^"]
        assert "for 'm' write 'M'" in problem.message

    def test_carets_stay_aligned_below_wide_and_control_characters(self):
        (problem,) = problems_of(patterns.parse, "日M\t-")
        assert problem.detail.splitlines() == ["  日M�-", "  ^^ ^"]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "is empty"),
            ("M||M", "segment without layers"),
            ("|M", "segment without layers"),
            ("M|", "segment without layers"),
            ("M/", "'/' without layers"),
            ("M/M/", "'/' without layers"),
            ("/M", "no layers before '/'"),
            ("M/M/*", "must repeat the same layers"),
            ("M/M|M", "take the '|' out"),
            ("M*D", "mixes '*' attention with 'D'"),
            ("M*/M+", "mixes '*' attention with '+'"),
        ],
    )
    def test_mistakes(self, text, words):
        assert words in problems_of(patterns.parse, text)[0].message

    def test_all_mistakes_come_at_once(self):
        assert len(problems_of(patterns.parse, "Mq||*D/M|/")) == 5

    @pytest.mark.parametrize("text", ["", "M||M", "M/", "/M", "M*/D"])
    def test_upstream_takes_these_mistakes_silently(self, text):
        UPSTREAM.parse_hybrid_pattern(text)


class TestRatios:
    def test_equal_to_upstream_for_every_case_up_to_128_layers(self):
        """Every attention count with every MLP count that steps of 0.02 reach: the ratios only enter as rounded counts.

        Both functions see the ratios through `round(n * ratio)` alone, so the least ratio of each count is exhaustive.
        """
        steps = [step * 0.02 for step in range(51)]
        for n in range(1, 129):
            one_of_count = {round(n * ratio): ratio for ratio in reversed(steps)}
            for attention, mlp in itertools.product(one_of_count.values(), repeat=2):
                if attention + mlp <= 1:
                    expected = UPSTREAM.pattern_from_ratios(n, attention, mlp)
                    assert patterns.from_ratios(n, attention, mlp) == expected, (n, attention, mlp)

    def test_the_two_patterns_of_the_2024_example(self):
        assert patterns.from_ratios(48, 0.08, 0.5) == "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-"
        assert patterns.from_ratios(56, 0.08, 0.5) == "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"

    def test_no_ratios_are_pure_mamba_and_halves_a_transformer(self):
        assert patterns.from_ratios(8) == "M" * 8
        assert patterns.Pattern((patterns.from_ratios(64, 0.5, 0.5),)).ratios()["M"] == 0


class TestSettle:
    def test_a_pattern_wins_over_ratios(self):
        assert patterns.settle("M-", None, 0.5, 0.9).text == "M-"
        assert patterns.settle("M-", 2, 0.5, 0.9).text == "M-"

    def test_without_a_pattern_the_ratios_make_it(self):
        assert patterns.settle(None, 4, None, None).text == "MMMM"
        assert patterns.settle(None, 48, 0.08, 0.5).counts()["*"] == 4

    def test_a_sum_that_misses_one_by_rounding_is_one(self):
        assert patterns.settle(None, 10, 0.5, 0.5000000000000001).num_layers == 10

    def test_layers_against_the_pattern(self):
        (problem,) = problems_of(patterns.settle, "M-/M", 3, None, None)
        assert problem.place == "model.num_layers"
        assert "is 3, but model.layer_pattern 'M-/M' has 2 layers" in problem.message

    @pytest.mark.parametrize(
        ("args", "places"),
        [
            ((None, None, 0.1, None), ["model.layer_pattern"]),
            ((None, 0, -1.0, float("nan")), ["model.num_layers", "model.attention_ratio", "model.mlp_ratio"]),
            ((None, 4, 0.7, 0.7), ["model.mlp_ratio"]),
        ],
    )
    def test_mistakes(self, args, places):
        assert [problem.place for problem in problems_of(patterns.settle, *args)] == places


class TestSplit:
    @given(
        st.lists(st.integers(1, 9), min_size=1, max_size=9),
        st.integers(1, 9),
        st.integers(0, 20),
        st.integers(0, 20),
    )
    def test_no_cut_is_better(self, costs, parts, first, last):
        parts = min(parts, len(costs))
        sizes = patterns.balance(tuple(map(float, costs)), parts, first, last)
        assert sum(sizes) == len(costs) and min(sizes) >= 1 and len(sizes) == parts

        def quality(sizes):
            ends = [0, *itertools.accumulate(sizes)]
            stages = [sum(costs[start:end]) for start, end in itertools.pairwise(ends)]
            stages[0] += first
            stages[-1] += last
            return max(stages), sum(stage**2 for stage in stages)

        cuts = itertools.combinations(range(1, len(costs)), parts - 1)
        best = min(quality([end - start for start, end in itertools.pairwise([0, *cut, len(costs)])]) for cut in cuts)
        assert quality(sizes) == best

    def test_the_layers_stay_in_order_and_old_segments_are_dissolved(self):
        pattern = patterns.split(patterns.parse("M-|M-M*-M-/M"), 2, {"M": 2.0, "-": 1.0, "*": 1.0}, last=7.0)
        assert pattern.text == "M-M-M*-|M-/M"

    def test_a_large_pattern_splits_fast_and_evenly(self):
        layers = "".join(random.Random(0).choices("M*-", k=128))
        pattern = patterns.split(patterns.parse(layers), 16, {"M": 3.0, "-": 4.0, "*": 1.0})
        assert len(pattern.segments) == 16 and pattern.layers == layers


def test_strip_draws_a_lane_per_kind():
    drawn = patterns.strip(patterns.parse("M-M*|M-/M/M"))
    assert drawn.splitlines() == [
        "               1",
        "M Mamba x5     █·█·│█·╱█",
        "* attention x1 ···█│··╱·",
        "- MLP x2       ·█··│·█╱·",
        "",
        "the layers after ╱ are repeated for 2 depths",
    ]


@given(right_patterns, st.integers(20, 120))
def test_strip_keeps_its_width(text, width):
    drawn = patterns.strip(patterns.parse(text), width)
    margin = max(len(f"{symbol} {name} x99 ") for symbol, name in patterns.LAYER_KINDS.items())
    assert all(len(line) <= max(width, margin + 10) for line in drawn.splitlines()[:-1])


UPSTREAM = upstream()
