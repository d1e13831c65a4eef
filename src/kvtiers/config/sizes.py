"""Sizes as people write them: `"200Gi"`, `"2Ti"`, `"500GB"`, plain bytes. Pure functions.

`Ki Mi Gi Ti Pi` are powers of 1024, `K M G T P` powers of 1000; a `B` behind either changes nothing, nor does upper or lower
case. What `format_exact` writes, `parse_size` reads back as the same number.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40
LARGEST: Final = 1 << 60

FORMS: Final = 'a size such as "200Gi", "1.5Ti" or "500GB", or a whole number of bytes'

_LETTERS: Final = "KMGTP"
_UNITS: Final = {
    "": 1,
    **{letter: 1000**power for power, letter in enumerate(_LETTERS, 1)},
    **{f"{letter}I": 1024**power for power, letter in enumerate(_LETTERS, 1)},
}
# Lengths are bounded: Python refuses to convert a number of more than 4300 digits.
_SIZE: Final = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMGTP]I?)?B?", re.ASCII)


def parse_size(value: object) -> int:
    """Bytes. A fraction of a byte is cut off. Raises ValueError with the forms that are understood."""
    if isinstance(value, str):
        number = _from_text(value)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"must be {FORMS}")
    elif isinstance(value, float) and not value.is_integer():  # nan and inf too
        raise ValueError(f"must be {FORMS}; a fraction needs a unit")
    else:
        number = int(value)
    if number < 0:
        raise ValueError("must not be negative")
    if number > LARGEST:
        raise ValueError(f"must be at most {format_size(LARGEST)}")
    return number


def _from_text(text: str) -> int:
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None:
        if text.strip().startswith("-"):
            raise ValueError("must not be negative")
        raise ValueError(f"must be {FORMS}")
    number, unit = match.groups(default="")
    if not unit and "." in number:
        raise ValueError(f"must be {FORMS}; a fraction needs a unit")
    return int(Fraction(number) * _UNITS[unit])


def format_size(nbytes: int) -> str:
    """For reading: three digits or so, `"23.4 GiB"`."""
    if abs(nbytes) < KIB:
        return f"{nbytes} B"
    amount = float(nbytes)
    for letter in f"{_LETTERS}E":
        amount /= 1024
        if abs(amount) < 1023.95 or letter == "E":
            return f"{amount:.4g} {letter}iB" if abs(amount) >= 100 else f"{amount:.3g} {letter}iB"
    raise AssertionError("unreachable")


def format_exact(nbytes: int) -> str:
    """For a configuration: nothing lost, and as short as can be: `"200Gi"`, `"500GB"`, or plain bytes."""
    forms = [str(nbytes)]
    for unit, factor in _UNITS.items():
        if unit and nbytes and nbytes % factor == 0:
            forms.append(f"{nbytes // factor}{unit[0]}{'i' if unit.endswith('I') else 'B'}")
    return min(reversed(forms), key=len)
