"""Which numbers an argument may have, as data, and the one check of them; and which texts are patterns."""

from __future__ import annotations

import math
import numbers
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SHOWN_LENGTH = 80


@dataclass(frozen=True)
class Range:
    """The numbers that an argument may have. Infinite and undefined ones are in no range.

    Args:
        at_least: The least one.
        at_most: The greatest one.
        above: All are greater than this.
        below: All are less than this.
        also: Numbers outside of the range that mean something of their own, such as -1 for "not set".
        meaning: What those mean, for messages.
        advice: What to do instead of passing another number.
    """

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()
    meaning: str = ""
    advice: str = ""

    def __contains__(self, number: Any) -> bool:
        if not math.isfinite(number):
            return False
        return number in self.also or (
            (self.at_least is None or number >= self.at_least)
            and (self.at_most is None or number <= self.at_most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        parts = [f"{word} {_shown(bound)}" for word, bound in bounds.items() if bound is not None]
        text = " and ".join(parts) or "a finite number"
        for number in self.also:
            text += f", or {_shown(number)}{f' ({self.meaning})' if self.meaning else ''}"
        return text


ANY = Range()
COUNT = Range(at_least=1)
NOT_NEGATIVE = Range(at_least=0)
POSITIVE = Range(above=0)
PROBABILITY = Range(at_least=0, at_most=1)
SHARE = Range(at_least=0, below=1)
# What the generators of numpy take.
SEED = Range(at_least=0, at_most=2**32 - 1)


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) and number >= 10_000 else f"{number:g}"


def shown_value(value: Any) -> str:
    """`value` as a message shows it: cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}..."


def is_number(value: Any) -> bool:
    """Whether `value` is a number; a truth value is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def number_type(hint: Any) -> type | None:
    """`float` or `int` where a type hint allows numbers, also within a union or a container; else `None`."""
    if hint in (int, float):
        return hint  # type: ignore[no-any-return]
    found = [number_type(argument) for argument in typing.get_args(hint)]
    return float if float in found else int if int in found else None


def allows_none(hint: Any) -> bool:
    """Whether a type hint is an optional one."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return hint is Any or (is_union and types.NoneType in typing.get_args(hint))


def check_range(name: str, value: Any, allowed: Range, advice: str = "") -> None:
    """Raise `ValueError` where a number of `value`, a number or a container of some, is outside of `allowed`."""
    for number in _numbers_in(value):
        if number not in allowed:
            one = "" if number is value else f" has {number!r}, which"
            raise ValueError(f"{name}={shown_value(value)}{one} must be {allowed}. {allowed.advice or advice}".rstrip())


def _numbers_in(value: Any) -> Iterator[Any]:
    if is_number(value):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _numbers_in(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _numbers_in(item)


def check_regex(name: str, pattern: str) -> None:
    """Raise `ValueError` where `pattern` is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{name}={pattern!r} is not a regular expression: {error}. Write a list of names, or escape special "
            "characters with a backslash."
        ) from error
