"""Choosing tokens: each setting by itself, against its definition."""

from typing import Any

import pytest
import torch

from hybrid.errors import ConfigError
from hybrid.generation.sampling import NONE, Row, Sampling, choose, new_key, uniform

SHARES = torch.tensor([0.5, 0.3, 0.15, 0.05])


def counts(sampling: Sampling, draws: int = 4000, seen: tuple[int, ...] = ()) -> list[float]:
    rows = [Row(sampling, new_key(seed), seen=set(seen)) for seed in range(draws)]
    drawn = [chosen.token for chosen in choose(SHARES.log().expand(draws, -1), rows)]
    return [drawn.count(token) / draws for token in range(4)]


# Four standard deviations of a share of 4000 draws are at most 0.032.
@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), SHARES.tolist()),
        (Sampling(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.9), [0.526, 0.316, 0.158, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), [1, 0, 0, 0]),
        (Sampling(temperature=1.0, min_p=0.2), [0.526, 0.316, 0.158, 0]),
        (Sampling(temperature=0.5), (SHARES**2 / (SHARES**2).sum()).tolist()),
        (Sampling(temperature=0), [1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=1), [1, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_the_settings_say(sampling: Sampling, expected: list[float]) -> None:
    assert counts(sampling) == pytest.approx(expected, abs=0.032)


def test_a_penalty_makes_what_was_there_rarer() -> None:
    # A log of a share is negative: the penalty multiplies it, so that the share is taken to its power.
    weights = torch.tensor([0.5**1.5, 0.3, 0.15, 0.05])
    expected = (weights / weights.sum()).tolist()
    assert counts(Sampling(temperature=1.0, repetition_penalty=1.5), seen=(0,)) == pytest.approx(expected, abs=0.032)
    assert counts(Sampling(temperature=0, repetition_penalty=3.0), 2, seen=(0,)) == [0, 1, 0, 0]


def test_rows_with_different_settings_do_not_mix() -> None:
    settings = [Sampling(temperature=0), Sampling(temperature=1.0, top_k=2), Sampling(temperature=1.0, top_p=0.01)]
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = choose(logits, [Row(s, new_key(7)) for s in settings])
    alone = [choose(logits[i : i + 1], [Row(s, new_key(7))])[0] for i, s in enumerate(settings)]
    assert together == alone


def test_random_numbers_are_uniform_and_differ_by_seed_position_and_number() -> None:
    numbers = [uniform(new_key(seed), position) for seed in range(100) for position in range(100)]
    drawn = torch.tensor(numbers, dtype=torch.float64)
    assert drawn.unique().numel() == 10_000
    # 1.63 / sqrt(n) is what the largest gap of Kolmogorov and Smirnov exceeds in one of a hundred cases.
    gap = (drawn.sort().values - (torch.arange(10_000) + 0.5) / 10_000).abs().max()
    assert gap < 1.63 / 100
    assert uniform(new_key(1, 0), 0) != uniform(new_key(1, 1), 0)


def test_log_probabilities_are_those_before_the_settings() -> None:
    row = Row(Sampling(temperature=0.1, top_k=1, logprobs=2), new_key(0))
    (chosen,) = choose(SHARES.log()[None], [row])
    assert chosen.logprob == pytest.approx(float(SHARES[0].log()), abs=1e-6)
    assert [token for token, _ in chosen.top] == [0, 1]


def test_all_wrong_values_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(
            temperature=-1, top_k=-1, top_p=1.5, min_p=2, repetition_penalty=0, seed=2**70, stop=("",), logprobs=99
        )
    places = [problem.place for problem in caught.value.problems]
    assert places == ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "logprobs"]


@pytest.mark.parametrize(
    ("name", "value", "must_be"),
    [
        ("max_tokens", 5.5, "a whole number"),
        ("max_tokens", "5", "a whole number"),
        ("temperature", None, "a number"),
        ("temperature", True, "a number"),
        ("top_k", 2.5, "a whole number"),
        ("seed", "a", "a whole number or None"),
        ("seed", 1.5, "a whole number or None"),
        ("stop", 5, "a text or a list of texts"),
        ("stop", ["a", 5], "a text or a list of texts"),
        ("stop_tokens", 40, "a list of tokens"),
        ("stop_tokens", [True], "a list of tokens"),
        ("ignore_end", 1, "true or false"),
        ("logprobs", True, "a whole number or None"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any, must_be: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(**{name: value, "min_p": 7})
    shown = tuple(value) if isinstance(value, list) else value
    said = [str(problem) for problem in caught.value.problems if problem.place != "min_p"]
    assert said == [f"{name}: is {shown!r}; it must be {must_be}"] and len(caught.value.problems) == 2


def test_where_a_text_ends_is_said_by_one_text_or_several() -> None:
    stop: Any = "_("  # is no set of characters
    assert Sampling(stop=stop).stop == ("_(",)
    assert Sampling(stop=["_", "("]).stop == ("_", "(")  # type: ignore[arg-type]
    assert Sampling(temperature=1, top_p=1) == Sampling(temperature=1.0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-308, 5e-324])
def test_the_smallest_temperatures_take_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[1.0, 300.0, -300.0], [-5.0, -3.0, -4.0]])
    rows = [Row(Sampling(temperature=temperature, top_k=k), new_key(3)) for k in (0, 2)]
    assert [chosen.token for chosen in choose(logits, rows)] == [1, 1]


def test_no_token_is_chosen_where_there_are_no_numbers() -> None:
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[1.0, nan, 2.0], [0.0, inf, 0.0], [-inf, 1.0, -inf], [-inf, -inf, -inf]])
    for sampling in (Sampling(temperature=0), Sampling(seed=1), Sampling(logprobs=1), Sampling(top_k=2, min_p=0.1)):
        rows = [Row(sampling, new_key(1)) for _ in logits]
        assert [chosen.token for chosen in choose(logits, rows)] == [NONE, NONE, 1, NONE]
        assert [row.position for row in rows] == [0, 0, 1, 0]
