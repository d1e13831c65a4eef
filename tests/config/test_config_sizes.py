from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.config.sizes import LARGEST, format_exact, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("200Gi", 200 << 30),
        ("2Ti", 2 << 40),
        ("500GB", 500 * 10**9),
        ("64MiB", 64 << 20),
        ("1.5Gi", 3 << 29),
        ("0.1K", 100),
        (" 4 gib ", 4 << 30),
        ("10k", 10_000),
        ("7B", 7),
        ("0", 0),
        (4096, 4096),
        (2e9, 2 * 10**9),
    ],
)
def test_sizes_as_people_write_them(text: object, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "Gi",
        "1.5",
        "20Gx",
        "-1",
        "-1Gi",
        -1,
        "1e9",
        "١Gi",
        "1,5Gi",
        "1 2Gi",
        "0x10",
        True,
        None,
        [],
        1.5,
        math.nan,
        math.inf,
        "9" * 5000,
        "2000Pi",
        LARGEST + 1,
    ],
)
def test_what_is_no_size_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_size(bad)


@given(st.integers(0, LARGEST))
def test_an_exact_size_reads_back_as_itself(nbytes: int) -> None:
    assert parse_size(format_exact(nbytes)) == nbytes


@given(st.integers(0, 1 << 20), st.sampled_from([1, 1000, 1024, 10**9, 1 << 30]))
def test_an_exact_size_is_never_longer_than_the_plain_number(count: int, unit: int) -> None:
    text = format_exact(count * unit)
    assert parse_size(text) == count * unit
    assert len(text) <= len(str(count * unit))


@given(st.integers(0, LARGEST))
def test_a_readable_size_is_right_to_three_digits(nbytes: int) -> None:
    amount, unit = format_size(nbytes).split()
    assert float(amount) * 1024 ** " KMGTPE".index(unit.rstrip("iB") or " ") == pytest.approx(
        nbytes, rel=0.006
    )


def test_readable_sizes() -> None:
    assert [format_size(n) for n in (0, 1023, 1536, 200 << 30, 25_234_000_000)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "200 GiB",
        "23.5 GiB",
    ]
