"""Each of these once served wrong bytes, wrote where it should not, or called a hit a miss."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvtiers.core.messages import OpId, Priority
from kvtiers.model.errors import CacheClosed, ConfigError, InvalidArgument
from kvtiers.model.namespace import fingerprint_model
from kvtiers.records.codecs.none import NoCodec
from kvtiers.runtime import plan
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.pools import Job, WorkerPool
from kvtiers.runtime.results import PendingLoad
from kvtiers.testing.cache_oracle import SMALL_LAYOUT
from kvtiers.testing.chaos import namespace, small_config


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[TieredCache]:
    with TieredCache(small_config(tmp_path / "disk", {}), SMALL_LAYOUT, namespace()) as opened:
        yield opened


def test_every_single_tensor_counts_for_the_fingerprint(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {f"layer.{number}": torch.zeros(64, 64) for number in range(200)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = fingerprint_model(tmp_path)
    for number in (0, 77, 199):
        changed = dict(tensors)
        changed[f"layer.{number}"] = torch.full((64, 64), 0.5)
        save_file(changed, tmp_path / "model.safetensors")
        assert fingerprint_model(tmp_path) != before


def test_any_byte_of_other_weight_formats_counts_for_the_fingerprint(tmp_path: Path) -> None:
    content = bytearray(3 << 20)
    (tmp_path / "model.bin").write_bytes(content)
    before = fingerprint_model(tmp_path)
    content[2_000_001] = 1
    (tmp_path / "model.bin").write_bytes(content)
    assert fingerprint_model(tmp_path) != before


def test_background_work_that_fills_the_queue_leaves_room_for_loads() -> None:
    pool, release = WorkerPool("test", 1, 4), threading.Event()
    try:

        def job(priority: Priority) -> Job:
            return Job(OpId(0), priority, lambda: None, lambda: None)

        def stuck() -> None:
            release.wait(10)

        assert pool.submit(Job(OpId(0), Priority.STORE, stuck, lambda: None))
        while pool.submit(job(Priority.STORE)):
            pass
        assert all(pool.submit(job(Priority.LOAD)) for _ in range(100))
    finally:
        release.set()
        assert pool.close(10)


def test_cancelled_load_writes_nothing_afterwards() -> None:
    pending = PendingLoad(10.0)
    pending.cancel()
    assert not pending.begin_copy()
    with pytest.raises(CacheClosed, match="cancelled"):
        pending.result(0)


def test_cancel_after_the_end_changes_nothing(cache: TieredCache) -> None:
    tokens = list(range(64))
    cache.store(tokens, np.zeros(SMALL_LAYOUT.shape(64), dtype=np.uint16))
    pending = cache.load(tokens)
    assert pending.result(10).num_tokens == 64
    pending.cancel()
    assert pending.result(0).num_tokens == 64


@pytest.mark.parametrize("timeout", [-1.0, float("inf"), float("nan")])
def test_senseless_timeouts_are_refused_and_do_not_keep_close_waiting(
    cache: TieredCache, timeout: float
) -> None:
    with pytest.raises(InvalidArgument, match="timeout"):
        cache.load(list(range(64)), timeout=timeout)
    assert cache.close(5)


def test_lossy_codecs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossy(NoCodec):
        lossy = True

    monkeypatch.setattr(plan, "codec_for", lambda name, **options: Lossy())
    with pytest.raises(ConfigError, match="lossy"):
        plan.plan_node(small_config(tmp_path, {}))
