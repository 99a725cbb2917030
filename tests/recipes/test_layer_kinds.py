"""Every symbol of the pattern language is known wherever the kinds of layers are told apart."""

import pytest

from converters import arguments
from hybrid import weight_fields
from hybrid.pattern import CONVERTED, LAYER_KINDS
from recipes import apply, check, picture, resolve, settings, shrink
from recipes.planning import plan

NEEDS = {"E": ["model.num_experts=8"], "G": ["model.activation=swiglu"]}


@pytest.mark.parametrize("symbol", LAYER_KINDS)
def test_a_kind_of_layer_is_checked_planned_drawn_and_shrunken(symbol: str) -> None:
    words = [f"model.layer_pattern=M{symbol}", "parallel=single", *NEEDS.get(symbol, [])]
    recipe = apply(resolve("hybrid_8b"), words)
    found = settings(shrink(recipe)).model.pattern
    assert set(found.layers) == {"M", symbol}
    assert not check(shrink(recipe))
    planned = plan(recipe).plan
    assert planned.counts[symbol] and planned.inference.weights
    assert LAYER_KINDS[symbol] in picture.svg(planned)
    model = settings(recipe).model
    assert not weight_fields.differing(model, model)


def test_what_is_converted_is_among_the_kinds() -> None:
    assert set(CONVERTED) | set(arguments._OF_KIND) <= set(LAYER_KINDS)
