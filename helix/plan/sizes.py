"""Lengths and lists as people write them: 128K, 1M, 1,8,32."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KM]?)", re.IGNORECASE)


def parse_size(name: str, text: str) -> int:
    """Return the whole positive number that a text stands for; K is 1,024 and M 1,048,576.

    Raises:
        ValueError: in one line that begins with the setting's name, for any other text.
    """
    match = _SIZE.fullmatch(text.strip())
    value = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if value < 1 or value != int(value):
        raise ValueError(f"{name} = {text} must be a whole number of at least 1, such as 8, 128K or 1M")
    return int(value)


def parse_sizes(name: str, text: str) -> list[int]:
    """Return the numbers of a list that commas separate, each once."""
    return list(dict.fromkeys(parse_size(name, each) for each in text.strip("[]").split(",")))


def short(size: int) -> str:
    """Return a number as people write it: 128K, 1M, or to one decimal 24.1M."""
    for unit, factor in (("M", _UNITS["M"]), ("K", _UNITS["K"])):
        if size >= factor:
            return f"{size / factor:.1f}".removesuffix(".0") + unit
    return str(size)
