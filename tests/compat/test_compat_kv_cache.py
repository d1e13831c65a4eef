"""The two calls of the sequence diagram over a real cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvtiers import CacheConfig, KVLayout, Namespace, Tier, TieredCache
from kvtiers.compat import KVCacheEngine, KVData
from kvtiers.model.errors import CacheClosed, LayoutMismatch

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=16, dtype="float16")
TOKENS = list(range(40))
KV = np.random.default_rng(1).random(LAYOUT.shape(40)).astype(np.float16)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[KVCacheEngine]:
    config = CacheConfig.from_mapping(
        {
            "storage": {
                "chunk_tokens": 16,
                "cpu": {"buffer_size": "4Mi"},
                "disk": {"enabled": True, "path": str(tmp_path), "max_size": "64Mi"},
            }
        },
        environ={},
    )
    with KVCacheEngine(
        TieredCache(config, LAYOUT, Namespace(model="m", fingerprint="f", engine="t"))
    ) as engine:
        yield engine


def test_what_was_stored_is_found_and_the_rest_is_to_be_computed(engine: KVCacheEngine) -> None:
    receipt = engine.store_kv_cache(KVData(TOKENS, KV))
    assert receipt.accepted_tokens == 32
    found = engine.lookup_kv_cache([*TOKENS, 1000, 1001])
    assert found is not None
    assert list(found.token_ids) == TOKENS[:32]
    assert np.array_equal(found.kv, KV[:, :, :32])
    assert found.tiers == (Tier.CPU, Tier.CPU)


def test_what_was_found_can_be_stored_again(engine: KVCacheEngine) -> None:
    engine.store_kv_cache((TOKENS, KV))
    found = engine.lookup_kv_cache(TOKENS)
    assert found is not None
    receipt = engine.store_kv_cache(found)
    assert (receipt.accepted, receipt.present) == (0, 2)


def test_a_miss_is_none(engine: KVCacheEngine) -> None:
    assert engine.lookup_kv_cache(TOKENS) is None
    engine.store_kv_cache((TOKENS, KV), salt="theirs")
    assert engine.lookup_kv_cache(TOKENS) is None
    assert engine.lookup_kv_cache(TOKENS, salt="theirs") is not None
    assert engine.lookup_kv_cache([]) is None


def test_a_disk_hit_comes_back_through_memory(engine: KVCacheEngine) -> None:
    engine.store_kv_cache((TOKENS, KV)).wait(20)
    engine.cache.evict("cpu")
    found = engine.lookup_kv_cache(TOKENS, timeout=20)
    assert found is not None
    assert found.tiers == (Tier.DISK, Tier.DISK)
    assert np.array_equal(found.kv, KV[:, :, :32])


def test_wrong_shapes_and_closed_engines_are_told(engine: KVCacheEngine) -> None:
    with pytest.raises(LayoutMismatch):
        engine.store_kv_cache((TOKENS, KV[:1]))
    assert engine.close()
    with pytest.raises(CacheClosed):
        engine.store_kv_cache((TOKENS, KV))
    with pytest.raises(CacheClosed):
        engine.lookup_kv_cache(TOKENS)
