"""Values read by their annotation, and values checked against it."""

import enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes import typed


class Colour(enum.Enum):
    RED = 1
    GREEN = 2


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("1_000", int, 1000),
        ("-3", int, -3),
        ("2e3", int, 2000),
        ("1e-4", float, 1e-4),
        ("3", float, 3.0),
        ("true", bool, True),
        ("off", bool, False),
        ("M-M*-", str, "M-M*-"),
        ("'None'", str, "None"),
        ('"a b"', str, "a b"),
        ("None", int | None, None),
        ("null", str | None, None),
        ("'null'", str | None, "null"),
        ("7", int | None, 7),
        ("7", str | int, 7),
        ("x", str | int, "x"),
        ("2", Literal[1, 2], 2),
        ("none", Literal["none", "full"], "none"),
        ("RED", Colour, Colour.RED),
        ("2", Colour, Colour.GREEN),
        ("[99, 1.0, 0,]", list[float], [99.0, 1.0, 0.0]),
        ("[a, 'b, c']", list[str], ["a", "b, c"]),
        ("[]", list[int], []),
        ("[[1], [2, 3]]", list[list[int]], [[1], [2, 3]]),
        ("[1, x, true]", list, [1, "x", True]),
        ("{a: 1, 'b': 2}", dict[str, int], {"a": 1, "b": 2}),
        ("{}", dict, {}),
        ("(1, b)", tuple[int, str], (1, "b")),
        ("a/b", Path, Path("a/b")),
        ("{'x': [1]}", Any, {"x": [1]}),
    ],
)
def test_text_becomes_the_value_of_its_type(text: str, annotation: Any, value: Any) -> None:
    read = typed.parse(text, annotation)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation", "reason"),
    [
        ("big", int, "'big' is not a whole number"),
        ("1.5", int, "1.5 is not a whole number"),
        ("1e400", int, "1e400 is not a whole number"),
        ("1e30", int, "1e30 is too large to be exact; write out its digits"),
        ("nan", float, "nan is not a finite number"),
        ("maybe", bool, "'maybe' is not true or false"),
        ("None", str, "takes text and cannot be None; for the word itself write it in quotes: \"'None'\""),
        ("gleu", Literal["gelu", "swiglu"], "'gleu' is not one of gelu, swiglu; did you mean gelu?"),
        ("big", int | None, "'big' is not a whole number"),
        ("[1, x]", list[int], "'x' is not a whole number"),
        ("[1,, 2]", list[int], "'1,, 2' has nothing between two commas"),
        ("[1", list[int], "'[1' is not a list of whole numbers, such as [1, 2]"),
        ("[[1, 2]", list[int], "'[1, 2' lacks a closing ]"),
        ("[1)]", list[int], "'1)' has a ')' that closes nothing"),
        ("3", list[float], "'3' is not a list of numbers, such as [1, 2]"),
        ("{a: 1, a: 2}", dict[str, int], "'a' is there twice"),
        ("{a}", dict[str, int], "'a' has no ':' between key and value"),
        ("(1)", tuple[int, int], "'(1)' has 1 values, not 2"),
    ],
)
def test_what_is_not_of_the_type_says_why(text: str, annotation: Any, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        typed.parse(text, annotation)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (3, float),
        (3, int),
        (None, int | None),
        ("gelu", Literal["gelu"]),
        ([1.0, 2], list[float]),
        ({"a": 1}, dict[str, int]),
    ],
)
def test_values_of_the_type_conform(value: Any, annotation: Any) -> None:
    assert typed.conform(value, annotation) == value


@pytest.mark.parametrize(
    ("value", "annotation", "reason"),
    [
        (True, int, "True is not a whole number"),
        (3.0, int, "3.0 is not a whole number"),
        ("3", int | None, "'3' is not a whole number or None"),
        (True, Literal[1, 2], "True is not one of 1, 2"),
        ("gleu", Literal["gelu"], "'gleu' is not one of gelu; did you mean gelu?"),
        (float("inf"), float, "inf is not a finite number"),
        (["a"], list[float], "['a'] is not a list of numbers, such as [1, 2]"),
    ],
)
def test_values_of_another_type_do_not(value: Any, annotation: Any, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        typed.conform(value, annotation)
    assert str(error.value) == reason


@given(st.recursive(st.floats(allow_nan=False, allow_infinity=False), lambda inner: st.lists(inner, max_size=3)))
def test_what_python_writes_is_read_back(value: Any) -> None:
    annotation: Any = float
    depth, item = 0, value
    while isinstance(item, list):
        depth, item = depth + 1, item[0] if item else 0.0
    for _ in range(depth):
        annotation = list[annotation]
    try:
        assert typed.parse(repr(value), annotation) == value
    except ValueError:
        assert "[" in repr(value)  # lists of different depths are of no one type


@given(
    st.text(), st.sampled_from([int, float, bool, str, int | None, list[int], list, dict, dict[str, int], tuple, Any])
)
def test_any_text_is_a_value_or_a_reason(text: str, annotation: Any) -> None:
    try:
        value = typed.parse(text, annotation)
    except ValueError as error:
        assert str(error)
    else:
        if annotation in (int, float, bool, str):
            assert type(value) is annotation
