"""What a value that comes from outside must be before anything relies on it.

Files, the Python API and HTTP all make the same few objects of what they are given (``Request``, ``SamplingParams``,
``Retention``); these call the checks here, so that a value is refused in one place and in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args, get_origin

INT64_LIMIT = 2**63
MOST = 2**31 - 1  # pages, rows and positions are 32-bit integers on the device
MOST_SECONDS = 1_000_000  # some waits count milliseconds in 32 bits


def conforms(value: object, expected: Any) -> bool:
    """Say whether a value is of a type, as annotated; an int passes for a float, a bool for neither."""
    kind, inner = get_origin(expected), get_args(expected)
    if kind is list:
        return isinstance(value, list | tuple) and all(conforms(item, inner[0]) for item in value)
    if kind is dict:
        return isinstance(value, Mapping) and all(
            conforms(key, inner[0]) and conforms(item, inner[1]) for key, item in value.items()
        )
    if isinstance(expected, UnionType):
        return any(conforms(value, choice) for choice in inner)
    return type(value) in ((float, int) if expected is float else (expected,))


def plain_number(value: Any) -> Any:
    """Return a number of another library, such as NumPy's, as Python's own; any other value as it is."""
    if type(value) in (int, float, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def whole_number(value: Any) -> Any:
    """Return a number that is whole, 4.0 and NumPy's among them, as an int; any other value as it is."""
    value = plain_number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_text(name: str, value: object) -> None:
    """Raise ValueError where a string in a value, a text or JSON's lists and objects of them, is no valid text.

    A lone surrogate is legal in JSON and in Python's strings, but cannot be written, sent or tokenised.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} is no valid text: character {error.start}, {value[error.start]!r}, is a lone surrogate"
            ) from error
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_text(f"a key of {name}", key)
            check_text(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            check_text(f"{name}[{number}]", item)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the setting has one of its values."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r} must be one of {', '.join(choices)}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError when the setting is below its least value, or above what any can be: a count, or seconds."""
    most = MOST_SECONDS if name.endswith("_s") else MOST
    if value > most:
        raise ValueError(f"{name} = {value} must be at most {most}")
    if not value >= least:
        raise ValueError(f"{name} = {value} must be at least {least}")


def one_line(error: BaseException) -> str:
    """Return an exception's message on a single line, with its type when the message alone would not tell."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = " ".join(str(error).split())
    return message if isinstance(error, ValueError) and message else f"{type(error).__name__}: {message}"
