"""Values of a type annotation: read from the text of an override or a file, or checked as they stand."""

import ast
import enum
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from hybrid.errors import nearest

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_NONE = ("none", "null")
_OPEN, _CLOSE = "([{", ")]}"


def parse(text: str, annotation: Any) -> Any:
    """Return the value of type `annotation` that `text` says.

    The grammar is NeMo-Run's: `None`, `true`, `1_000`, `1e-4`, `[0.1, 0.2]`, `{'a': 1}`, bare or quoted text. Quotes
    make text of what would be something else (`'None'`). Raises ValueError with the reason, made to follow a field's
    name.
    """
    text = text.strip()
    options = _options(annotation)
    if type(None) in options and text.lower() in _NONE:
        return None
    options = [option for option in options if option is not type(None)]
    # Text comes last: every value can be read as text.
    for option in sorted(options, key=lambda option: option is str):
        try:
            return _parse_one(text, option)
        except _WrongError as error:
            reason = str(error)
            if len(options) == 1:
                raise ValueError(reason) from None
    raise ValueError(f"{_quoted(text)} is not {describe(annotation)}")


def conform(value: Any, annotation: Any) -> Any:
    """Return `value` if it is of type `annotation`; a whole number stays one where a number is expected.

    Raises ValueError with the reason.
    """
    for option in _options(annotation):
        try:
            return _conform_one(value, option)
        except _WrongError:
            continue
    hint = ""
    if isinstance(value, str):
        hint = nearest(value, [str(choice) for option in _options(annotation) for choice in _choices(option)])
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    raise ValueError(f"{value!r} is not {describe(annotation)}{hint}")


def describe(annotation: Any) -> str:
    """Say in words what an annotation takes: 'a whole number or None'."""
    names = [_describe_one(option) for option in _options(annotation)]
    return " or ".join(sorted(names, key=lambda name: name == "None"))


class _WrongError(ValueError):
    """The value is not of the type."""


def _options(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def _choices(option: Any) -> list[Any]:
    if get_origin(option) is Literal:
        return list(get_args(option))
    return list(option.__members__) if isinstance(option, type) and issubclass(option, enum.Enum) else []


def _describe_one(option: Any) -> str:
    if choices := _choices(option):
        return f"one of {', '.join(map(str, choices))}"
    origin, args = get_origin(option) or option, get_args(option)
    if origin is list and args:
        choices = _choices(args[0])
        example = f"[{choices[0]}]" if choices else "[a, b]" if args[0] is str else "[1, 2]"
        return f"a list of {_plural(args[0])}, such as {example}"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "None",
        Path: "a path",
        list: "a list such as [1, 2]",
        tuple: "a tuple such as (1, 2)",
        dict: "a dictionary such as {'a': 1}",
    }
    return names.get(origin, getattr(option, "__name__", str(option)))


def _plural(annotation: Any) -> str:
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(
        annotation, f"values, each {describe(annotation)}"
    )


def _parse_one(text: str, option: Any) -> Any:
    if choices := _choices(option):
        bare = unquote(text)
        for choice in choices:
            if str(choice) == bare:
                return getattr(option, choice) if isinstance(option, type) else choice
        if isinstance(option, type):  # an enum, also by value
            for name in choices:
                if str(getattr(option, name).value) == bare:
                    return getattr(option, name)
        raise _WrongError(f"{_quoted(bare)} is not {_describe_one(option)}{nearest(bare, map(str, choices))}")
    origin, args = get_origin(option) or option, get_args(option)
    if origin is list:
        return _sequence(text, "[]", option, args[0] if args else Any)
    if origin is tuple:
        items = split(_inside(text, "()", option))
        if args and args[-1] is not Ellipsis and len(items) != len(args):
            raise _WrongError(f"{_quoted(text)} has {len(items)} values, not {len(args)}")
        kinds = args if args and args[-1] is not Ellipsis else [args[0] if args else Any] * len(items)
        return tuple(_item(item, kind) for item, kind in zip(items, kinds, strict=True))
    if origin is dict:
        return _dictionary(text, option, *(args or (Any, Any)))
    if option is Any:
        return _guess(text)
    if option is str:
        if text.lower() in _NONE:
            raise _WrongError(f"takes text and cannot be None; for the word itself write it in quotes: \"'{text}'\"")
        return unquote(text)
    if option is Path:
        return Path(unquote(text))
    readers = {int: _whole, float: _number, bool: _truth}
    if option not in readers:
        raise _WrongError(f"has a type that cannot be set from text ({describe(option)})")
    return readers[option](text)


def _conform_one(value: Any, option: Any) -> Any:
    if choices := _choices(option):
        if isinstance(option, type) and isinstance(value, option):
            return value
        if any(choice == value and type(choice) is type(value) for choice in choices):
            return value
        raise _WrongError
    origin, args = get_origin(option) or option, get_args(option)
    if option is Any or (option is type(None) and value is None):
        return value
    if origin is float:
        right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    elif origin is int:
        right = isinstance(value, int) and not isinstance(value, bool)
    elif origin is list:
        right = isinstance(value, list) and all(_conforms(item, args[0]) for item in value if args)
    elif origin is tuple:
        right = isinstance(value, tuple)
    elif origin is dict:
        right = isinstance(value, dict) and all(
            _conforms(key, args[0]) and _conforms(item, args[1]) for key, item in value.items() if args
        )
    else:
        right = isinstance(origin, type) and isinstance(value, origin)
    if not right:
        raise _WrongError
    return value


def _conforms(value: Any, annotation: Any) -> bool:
    try:
        conform(value, annotation)
    except ValueError:
        return False
    return True


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        raise _WrongError(f"{_quoted(text)} is not a whole number") from None
    if not number.is_integer():  # infinity and NaN are none either
        raise _WrongError(f"{text} is not a whole number")
    if abs(number) >= 2**53:
        raise _WrongError(f"{text} is too large to be exact; write out its digits")
    return int(number)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise _WrongError(f"{_quoted(text)} is not a number") from None
    if not math.isfinite(number):
        raise _WrongError(f"{text} is not a finite number")
    return number


def _truth(text: str) -> bool:
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise _WrongError(f"{_quoted(text)} is not true or false")


def _sequence(text: str, brackets: str, option: Any, kind: Any) -> list[Any]:
    return [_item(item, kind) for item in split(_inside(text, brackets, option))]


def _dictionary(text: str, option: Any, key_kind: Any, value_kind: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for item in split(_inside(text, "{}", option)):
        key, colon, value = cut(item, ":")
        if not colon:
            raise _WrongError(f"{_quoted(item)} has no ':' between key and value")
        name = _item(key, key_kind)
        if name in found:
            raise _WrongError(f"{name!r} is there twice")
        found[name] = _item(value, value_kind)
    return found


def _item(text: str, kind: Any) -> Any:
    try:
        return parse(text, kind)
    except ValueError as error:
        raise _WrongError(str(error)) from None


def _inside(text: str, brackets: str, option: Any) -> str:
    if len(text) < 2 or text[0] != brackets[0] or text[-1] != brackets[1]:
        raise _WrongError(f"{_quoted(text)} is not {describe(option)}")
    return text[1:-1]


def _guess(text: str) -> Any:
    if text.lower() in _NONE:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def unquote(text: str) -> str:
    """Take one pair of quotes off, if it surrounds all of `text`."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def split(text: str) -> list[str]:
    """Cut at the commas outside brackets and quotes. A comma at the end is allowed, an empty item is not."""
    if not text.strip():
        return []
    items = []
    rest = text
    while True:
        item, comma, rest = cut(rest, ",")
        if not item.strip():
            raise _WrongError(f"{_quoted(text)} has nothing between two commas")
        items.append(item.strip())
        if not comma or not rest.strip():
            return items


def cut(text: str, separator: str) -> tuple[str, str, str]:
    """`str.partition`, but at the first separator outside brackets and quotes."""
    for place in top_level(text):
        if text[place] == separator:
            return text[:place], separator, text[place + 1 :]
    return text, "", ""


def top_level(text: str) -> Iterator[int]:
    """Yield the places of `text` outside of brackets and quotes. Raises ValueError if one of them never ends."""
    stack: list[str] = []
    quote = ""
    for place, symbol in enumerate(text):
        if quote:
            quote = "" if symbol == quote else quote
        elif symbol in "'\"":
            quote = symbol
        elif symbol in _OPEN:
            stack.append(_CLOSE[_OPEN.index(symbol)])
        elif symbol in _CLOSE:
            if not stack or stack.pop() != symbol:
                raise _WrongError(f"{_quoted(text)} has a '{symbol}' that closes nothing")
        elif not stack:
            yield place
    if stack or quote:
        raise _WrongError(f"{_quoted(text)} lacks a closing {stack[-1] if stack else quote}")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function's parameters; Any for those that are missing or mean nothing at run time."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        if isinstance(annotation, str):
            try:
                annotation = typing.get_type_hints(
                    types.SimpleNamespace(__annotations__={name: annotation}), function.__globals__
                )[name]
            except (NameError, TypeError, SyntaxError):
                annotation = Any
        found[name] = annotation
    return found
