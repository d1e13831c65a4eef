"""Copies between blocks and a chunk's part, against the plainest way to do it."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.integrations.vllm.blocks import Bytes, HostBlocks, runs

NUM_BLOCKS = 12


class Case(NamedTuple):
    block_bytes: list[int]
    per_chunk: int
    first: int
    ids: list[int]
    strided: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    per_chunk = draw(st.integers(1, 6))
    first = draw(st.integers(0, per_chunk - 1))
    count = draw(st.integers(1, per_chunk - first))
    start = draw(st.integers(0, NUM_BLOCKS - count))
    scattered = st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=count, max_size=count, unique=True)
    ids = draw(scattered | st.just(list(range(start, start + count))))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    return Case(sizes, per_chunk, first, ids, draw(st.booleans()), draw(st.integers(0, 1 << 16)))


def regions_of(case: Case, rng: np.random.Generator) -> list[Bytes]:
    """`strided`: each block is a part of a wider row, as in an allocation that holds all layers block by block."""
    pad = 3 if case.strided else 0
    rows = [rng.integers(0, 256, (NUM_BLOCKS, size + pad), np.uint8) for size in case.block_bytes]
    return [row[:, :size] for row, size in zip(rows, case.block_bytes, strict=True)]


def place(case: Case, region: int, block: int) -> slice:
    """Where a block of a chunk lies in its part."""
    start = case.per_chunk * sum(case.block_bytes[:region]) + block * case.block_bytes[region]
    return slice(start, start + case.block_bytes[region])


@given(cases())
def test_blocks_land_in_their_places_and_nowhere_else(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    regions = regions_of(case, rng)
    part = rng.integers(0, 256, case.per_chunk * sum(case.block_bytes), np.uint8)
    expected = part.copy()
    for index, region in enumerate(regions):
        for offset, block in enumerate(case.ids):
            expected[place(case, index, case.first + offset)] = region[block]
    HostBlocks(regions, case.per_chunk).read(case.ids, part, case.first)
    assert np.array_equal(part, expected)


@given(cases())
def test_places_land_in_their_blocks_and_nowhere_else(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    regions = regions_of(case, rng)
    part = rng.integers(0, 256, case.per_chunk * sum(case.block_bytes), np.uint8)
    expected = [region.copy() for region in regions]
    for index, region in enumerate(expected):
        for offset, block in enumerate(case.ids):
            region[block] = part[place(case, index, case.first + offset)]
    HostBlocks(regions, case.per_chunk).write(part, case.first, case.ids)
    assert all(np.array_equal(one, other) for one, other in zip(regions, expected, strict=True))


@given(st.lists(st.integers(0, 30), max_size=12))
def test_runs_are_as_long_as_can_be_and_leave_nothing_out(ids: list[int]) -> None:
    found = list(runs(ids))
    assert [block + step for _, count, block in found for step in range(count)] == ids
    assert [begin for begin, _, _ in found] == [sum(one[1] for one in found[:n]) for n in range(len(found))]
    for (_, count, block), (_, _, following) in pairwise(found):
        assert block + count != following
