"""What callers hand over, looked at where it comes in: a wrong type is a named error there, not a TypeError three files deeper.

Numbers of numpy count as numbers; a bool does not.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, Final

from kvtiers.model.errors import InvalidArgument

LONGEST_TIMEOUT_S: Final = 86_400
"""Longer waits are a mistake in a unit; the system's own limit is not far above."""


def _number(value: object) -> float | None:
    return None if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def seconds(value: Any, name: str = "timeout") -> float:
    """A time to wait. Raises InvalidArgument unless it is a number from 0 to a day."""
    number = _number(value)
    if number is None or not 0 <= number <= LONGEST_TIMEOUT_S:  # NaN too
        raise InvalidArgument(f"{name} is a number of seconds from 0 to {LONGEST_TIMEOUT_S}, got {value!r}")
    return number


def seconds_at_most_a_day(value: Any, name: str = "timeout") -> float:
    """The same for a wait that may be without end, or over before it begins: infinity is a day, what is negative is 0."""
    number = _number(value)
    if number is None or math.isnan(number):
        return seconds(value, name)
    return min(max(number, 0.0), float(LONGEST_TIMEOUT_S))


def share(value: Any, name: str) -> float:
    """A part of a whole. Raises InvalidArgument unless it is a number from 0 to 1."""
    number = _number(value)
    if number is None or not 0 <= number <= 1:
        raise InvalidArgument(f"{name} is a share between 0 and 1, got {value!r}")
    return number


def position(value: Any, name: str) -> int:
    """A place in a prompt. Raises InvalidArgument unless it is an integer from 0 on."""
    return whole(value, f"{name} is a number of tokens", 0)


def whole(value: Any, what: str, least: int) -> int:
    """`what`: "size is a number of bytes". Raises InvalidArgument unless it is an integer from `least` on."""
    number: object = value
    if isinstance(number, bool) or not isinstance(number, Integral) or int(number) < least:
        raise InvalidArgument(f"{what} from {least} on, got {value!r}")
    return int(number)
