"""What makes no sense is refused where it comes in, by an error of ours that says what is allowed; nothing is changed by it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvtiers.model.errors import CacheClosed, InvalidArgument
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.results import LoadedKV, PendingLoad
from kvtiers.testing.cache_oracle import CacheOracle

if TYPE_CHECKING:
    from tests.runtime.conftest import MakeCache

TOKENS = list(range(64))
Call = Callable[[TieredCache, Any], object]

CALLS: dict[str, Call] = {
    "token ids that are a number, stored": lambda cache, kv: cache.store(5, kv),  # type: ignore[arg-type]
    "token ids that are a number, loaded": lambda cache, _: cache.load(5),  # type: ignore[arg-type]
    "token ids that are a number, looked up": lambda cache, _: cache.lookup(5),  # type: ignore[arg-type]
    "start, a text": lambda cache, kv: cache.store(TOKENS, kv, start="a"),  # type: ignore[arg-type]
    "start, a fraction": lambda cache, kv: cache.store(TOKENS, kv, start=1.5),  # type: ignore[arg-type]
    "start below 0": lambda cache, kv: cache.store(TOKENS, kv, start=-1),
    "usage, a text": lambda cache, _: cache.evict("cpu", "a"),  # type: ignore[arg-type]
    "usage, not a number": lambda cache, _: cache.evict("cpu", float("nan")),
    "load's timeout, a text": lambda cache, _: cache.load(TOKENS, timeout="a"),  # type: ignore[arg-type]
    "flush's timeout, not a number": lambda cache, _: cache.flush(float("nan")),
    "integrity's timeout, not a number": lambda cache, _: cache.check_integrity(float("nan")),
    "close's timeout, not a number": lambda cache, _: cache.close(float("nan")),
    "close's timeout, a text": lambda cache, _: cache.close("a"),  # type: ignore[arg-type]
    "result's timeout, too large for any clock": lambda cache, _: cache.load(TOKENS).result(timeout=1e30),
    "cancel's timeout, not a number": lambda cache, _: cache.load(TOKENS).cancel(float("nan")),
    "receipt's timeout, a text": lambda cache, kv: cache.store(TOKENS, kv).wait("a"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_senseless_arguments_are_named_errors(make_cache: MakeCache, oracle: CacheOracle, call: Call) -> None:
    cache = make_cache()
    with pytest.raises(InvalidArgument):
        call(cache, oracle.kv(TOKENS))
    cache.store(TOKENS, oracle.kv(TOKENS))
    loaded = cache.load(TOKENS).result()
    oracle.check(TOKENS, loaded.num_tokens, loaded.kv)


def test_numbers_of_numpy_are_numbers(make_cache: MakeCache, oracle: CacheOracle) -> None:
    cache = make_cache()
    assert cache.store(TOKENS, oracle.kv(TOKENS), start=np.int64(0)).accepted == 4  # type: ignore[arg-type]
    cache.flush(np.float32(20))  # type: ignore[arg-type]
    assert cache.evict("cpu", np.float64(0.0)).chunks == 4


def test_an_interrupted_commit_gives_its_slots_back(
    make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the chunks would be "being stored" until the session ends: never hit, never stored again."""
    cache = make_cache()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.node, "commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.store(TOKENS, oracle.kv(TOKENS))
    assert cache.stats()["tiers"]["cpu"]["leased_chunks"] == 0
    assert cache.store(TOKENS, oracle.kv(TOKENS)).accepted == 4


def test_a_load_under_way_at_the_fork_tells_the_child_at_once() -> None:
    pending, ended = PendingLoad(3600.0), PendingLoad(3600.0)
    ended.succeed(LoadedKV(0, None, (), None))
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # a child that waits is ended, and fails the test
        told = 0
        for call in (pending.result, pending.cancel):
            try:
                call()
            except CacheClosed as error:
                told += "parent process" in str(error)
        os._exit(told + (ended.result(0).num_tokens == 0))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 3
