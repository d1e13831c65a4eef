"""The whole cache on a shared directory whose server hangs: loads end by their deadline as misses, and all is well when it answers again.

As on a hard mount, whose calls never end: the system calls on the directory's files are held up. What a mount that gives them up does is
in test_shared_fs_gluster.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import namespace, small_config, wait_until

CHUNKS = 6
DEADLINE_S = 0.5
HANG_S = 20.0
"""A load that takes longer than this hangs."""
CALLS = ("open", "stat", "lstat", "mkdir", "rename", "unlink")
ONE, TWO, THREE, ABSENT = ([*range(start, start + CHUNKS * 16)] for start in range(0, 40_000, 10_000))
FROM_REMOTE = ((Tier.REMOTE,) * CHUNKS, None)


class Share:
    """A directory on which system calls can be made to hang."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.held = 0
        self._answers = threading.Event()
        self._answers.set()
        self._hanging: tuple[str, ...] = ()
        for name in CALLS:
            monkeypatch.setattr(os, name, self._holding(name, getattr(os, name)))

    def hang(self, *calls: str) -> None:
        self._hanging = calls
        self._answers.clear()

    def answer(self) -> None:
        self._answers.set()

    def _holding(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def held(path: Any, *arguments: Any, **named: Any) -> Any:
            if name in self._hanging and isinstance(path, str) and path.startswith(str(self.path)):
                self.held += not self._answers.is_set()
                self._answers.wait()
            return call(path, *arguments, **named)

        return held


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Share]:
    path = tmp_path / "share"
    path.mkdir()
    found = Share(path, monkeypatch)
    yield found
    found.answer()


def cache_on(path: Path) -> TieredCache:
    remote = {
        "enabled": True,
        "backend": "fs",
        "endpoint": str(path),
        "timeout_ms": 500,
        "absent_for_s": 0.05,
    }
    return TieredCache(small_config(None, {"remote": remote}), SMALL_LAYOUT, namespace())


@contextmanager
def cache_with_nothing_in_memory(path: Path) -> Iterator[TieredCache]:
    """Of a share with three prompts; at the end it is audited."""
    writer, oracle = cache_on(path), CacheOracle(namespace())
    for tokens in (ONE, TWO, THREE):
        writer.store(tokens, oracle.kv(tokens))
    writer.flush(HANG_S)
    assert writer.close(HANG_S)
    cache = cache_on(path)
    try:
        yield cache
        problems = cache.check_integrity()
    finally:
        ended = cache.close(HANG_S)
    assert ended
    assert problems == []


@pytest.fixture
def cache(share: Share) -> Iterator[TieredCache]:
    with cache_with_nothing_in_memory(share.path) as cache:
        yield cache
        share.answer()


def loaded(cache: TieredCache, tokens: list[int]) -> tuple[tuple[Tier, ...], MissReason | None]:
    """Where its chunks came from, every byte checked, and why it is not more."""
    found = cache.load(tokens, timeout=DEADLINE_S).result(HANG_S)
    CacheOracle(namespace()).check(tokens, found.num_tokens, found.kv)
    return found.tiers, found.stopped_by


def is_up(cache: TieredCache) -> bool:
    return bool(cache.stats()["tiers"]["remote"]["up"])


@pytest.mark.parametrize("calls", [CALLS, ("open",)], ids=["everything", "reads-alone"])
def test_loads_end_by_their_deadline_and_all_is_well_when_it_answers(
    cache: TieredCache, share: Share, calls: tuple[str, ...]
) -> None:
    """`reads-alone`: it still tells which records are there, so the loads hang in mid-read."""
    assert loaded(cache, ONE) == FROM_REMOTE
    share.hang(*calls)
    for tokens in (TWO, THREE):
        tiers, reason = loaded(cache, tokens)
        assert tiers == ()
        assert reason in {MissReason.STAGING_TIMEOUT, MissReason.TIER_OPEN}
    assert share.held
    assert loaded(cache, ONE) == ((Tier.CPU,) * CHUNKS, None)

    assert wait_until(lambda: not is_up(cache))
    assert loaded(cache, ABSENT) == ((), MissReason.TIER_OPEN)
    assert cache.lookup(TWO).stopped_by is MissReason.TIER_OPEN

    share.answer()
    assert wait_until(lambda: is_up(cache))
    for tokens in (TWO, THREE):
        tiers, reason = loaded(cache, tokens)  # some from memory: what the late reads have brought
        assert (len(tiers), reason) == (CHUNKS, None)
