"""Where blocks lie, from what vLLM says of its allocations (fakes of its `KVCacheTensor`, which is in another environment)."""

from __future__ import annotations

from dataclasses import dataclass

from kvtiers.integrations.vllm.plan import Region, regions_of
from kvtiers.testing.paged_blocks import CHUNK_BLOCKS, RANKS, REGIONS, paged_plan

BLOCKS = 10


@dataclass
class FakeTensor:
    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int = 0


@dataclass
class FakeConfig:
    kv_cache_tensors: list[FakeTensor]
    num_blocks: int = BLOCKS


def test_layer_after_layer_is_a_region_each() -> None:
    config = FakeConfig([FakeTensor(["a", "b", "c"], layer_stride=BLOCKS * 64, block_stride=64)])
    assert regions_of(config) == (Region(0, 64), Region(640, 64), Region(1280, 64))


def test_block_after_block_with_all_layers_is_one_region() -> None:
    config = FakeConfig([FakeTensor(["a", "b", "c"], layer_stride=64, block_stride=3 * 64)])
    assert regions_of(config) == (Region(0, 192),)


def test_several_tensors_of_one_allocation_are_one_behind_the_other() -> None:
    config = FakeConfig(
        [
            FakeTensor(["b"], layer_stride=BLOCKS * 32, block_stride=32, offset=BLOCKS * 64),
            FakeTensor(["a"], layer_stride=BLOCKS * 64, block_stride=64),
        ]
    )
    assert regions_of(config) == (Region(0, 64), Region(640, 32))


def test_tensors_that_share_their_blocks_are_counted_once() -> None:
    shared = [FakeTensor([name], layer_stride=64, block_stride=128) for name in "ab"]
    assert regions_of(FakeConfig(shared)) == (Region(0, 128),)


def test_groups_of_heads_are_regions_of_a_layer() -> None:
    config = FakeConfig([FakeTensor(["a", "b"], layer_stride=2 * BLOCKS * 16, block_stride=16)])
    assert regions_of(config) == tuple(Region(start, 16) for start in (0, 160, 320, 480))


def test_regions_cover_every_byte_once() -> None:
    config = FakeConfig([FakeTensor(["a", "b"], layer_stride=2 * BLOCKS * 16, block_stride=16)])
    covered = [0] * (2 * 2 * BLOCKS * 16)
    for start, nbytes in regions_of(config):
        for byte in range(start, start + BLOCKS * nbytes):
            covered[byte] += 1
    assert set(covered) == {1}


def test_each_rank_has_a_part_of_its_blocks_of_a_chunk() -> None:
    plan = paged_plan(BLOCKS)
    assert [part.rank for part in plan.parts] == list(range(RANKS))
    assert {part.nbytes for part in plan.parts} == {CHUNK_BLOCKS * sum(REGIONS)}


def test_epoch_is_another_namespace() -> None:
    plan = paged_plan(BLOCKS)
    digests = {plan.with_epoch(epoch).namespace.digest for epoch in (0, 1, 2)}
    assert len(digests) == 3
    assert plan.namespace.digest in digests
