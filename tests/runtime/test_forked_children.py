"""A forked child can use nothing of its parent's cache: it is told so, never hangs, never dies of it, and harms nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvtiers.core.messages import OpId, Priority
from kvtiers.model.errors import CacheClosed, DirectoryInUse, StoreUnavailable
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.pools import Job
from kvtiers.stores.guard import Operation
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import namespace, small_config
from kvtiers.testing.faulty_store import Stall

if TYPE_CHECKING:
    from tests.runtime.conftest import MakeCache, MakeChaos

pytestmark = pytest.mark.slow

TOKENS = list(range(100))
OTHERS = list(range(1000, 1100))
CHILD_DEADLINE_S = 30


def in_child(what: Callable[[], Any]) -> Any:
    """Fork, and return what the child computed, as JSON; fails if the child hangs, dies of a signal, or raises."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_DEADLINE_S)
        status = 1
        try:
            os.write(writer, json.dumps(what()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        told = answer.read()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return json.loads(told)


def entries(cache: TieredCache) -> dict[str, Callable[[], object]]:
    """Every public call of a cache and its node that needs more than the configuration."""
    node, oracle = cache.node, CacheOracle(namespace())
    kv = oracle.kv(TOKENS)
    return {
        "store": lambda: cache.store(TOKENS, kv),
        "lookup": lambda: cache.lookup(TOKENS),
        "load": lambda: cache.load(TOKENS).result(),
        "flush": cache.flush,
        "evict": lambda: cache.evict("cpu"),
        "stats": cache.stats,
        "check_integrity": cache.check_integrity,
        "a session": node.open_session,
        "a second cache on the node": lambda: TieredCache(cache.config, SMALL_LAYOUT, namespace(), node=node),
        "tick": node.tick,
        "tell": lambda: node.tell([]),
        "wait_settled": lambda: node.wait_settled(60),
        "inspect": lambda: node.inspect(lambda core: core.unfinished),
        "the node's flush": lambda: node.flush(60),
        "the node's stats": node.stats,
    }


def answers_of(cache: TieredCache) -> dict[str, str]:
    told = {}
    for name, call in entries(cache).items():
        try:
            call()
            told[name] = "worked"
        except CacheClosed as error:
            told[name] = str(error)
    return told


def lying_there(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def goes_on(cache: TieredCache, oracle: CacheOracle) -> None:
    """The parent's cache works as before."""
    assert cache.store(OTHERS, oracle.kv(OTHERS)).accepted == 6
    cache.flush()
    cache.evict("cpu")
    for tokens in (TOKENS, OTHERS):
        loaded = cache.load(tokens).result()
        assert loaded.num_tokens == 96
        oracle.check(tokens, 96, loaded.kv)
    assert cache.check_integrity() == []


def test_every_call_in_a_child_raises_and_names_the_parent(
    make_cache: MakeCache, oracle: CacheOracle
) -> None:
    cache = make_cache()
    cache.store(TOKENS, oracle.kv(TOKENS))
    cache.flush()
    told = in_child(lambda: answers_of(cache))
    message = f"this cache belongs to the parent process {os.getpid()}; open one in the child, with a disk path of its own"
    assert told == dict.fromkeys(entries(cache), message)
    goes_on(cache, oracle)


def test_locks_that_were_held_at_the_fork_are_waited_for_by_nobody(
    make_chaos: MakeChaos, oracle: CacheOracle
) -> None:
    one = make_chaos()
    released, held = threading.Event(), threading.Barrier(2)
    stalled = one.disk.inject(Stall(released), Operation.WRITE)
    one.cache.store(TOKENS, oracle.kv(TOKENS))
    assert stalled.wait_for_hit(20)

    def hold() -> None:
        with one.node._core._lock, one.cache._activity._changed:  # the locks that every call takes
            held.wait(20)
            held.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(20)
    try:
        told = in_child(lambda: [*answers_of(one.cache).values(), one.cache.close(), one.node.close()])
    finally:
        held.wait(20)
        holder.join()
        released.set()
    assert told[-2:] == [True, True]
    assert all(answer.startswith("this cache belongs to the parent process") for answer in told[:-2])


def test_closing_in_a_child_touches_neither_disk_nor_log_nor_lock(
    make_cache: MakeCache, oracle: CacheOracle, tmp_path: Path
) -> None:
    cache = make_cache({"disk.write_policy": "write_on_evict"})
    cache.store(TOKENS, oracle.kv(TOKENS))  # only in memory: a close that worked would write it
    assert cache.node.wait_settled(20)  # the walk after the start has written its note
    before = lying_there(tmp_path / "cache")

    def close() -> list[bool]:
        with cache as same:
            pass
        closed = [same.close(), same.node.close(), same.node.closed]
        same.__del__()
        return closed

    assert in_child(close) == [True, True, True]
    assert lying_there(tmp_path / "cache") == before
    with pytest.raises(DirectoryInUse):
        TieredCache(cache.config, SMALL_LAYOUT, namespace())
    assert cache.lookup(TOKENS).num_tokens == 96
    goes_on(cache, oracle)


def test_the_store_beneath_is_shut_in_a_child(
    make_cache: MakeCache, oracle: CacheOracle, tmp_path: Path
) -> None:
    cache = make_cache()
    cache.store(TOKENS, oracle.kv(TOKENS))
    cache.flush()
    store = cache.node.plan.stores[Tier.DISK].store
    refs = [record.ref for record in store.recover()]
    assert cache.node.wait_settled(20)  # the walk after the start has written its note
    before = lying_there(tmp_path / "cache")

    def use() -> list[str]:
        told = []
        for call in (
            lambda: store.delete(refs[0]),
            store.probe,
            lambda: store.remember(refs),
            lambda: store.exists(refs),
        ):
            try:
                call()
                told.append("worked")
            except StoreUnavailable as error:
                told.append(str(error))
        store.close()
        for volume in store._volumes:  # type: ignore[attr-defined]
            volume.catalog.write_note()
            volume.catalog.compact()
            volume.close()
        return told

    told = in_child(use)
    assert len(told) == 4
    assert all(answer.endswith("belongs to the parent process") for answer in told)
    assert lying_there(tmp_path / "cache") == before
    goes_on(cache, oracle)


def test_a_child_can_open_a_cache_of_its_own(
    make_cache: MakeCache, oracle: CacheOracle, tmp_path: Path
) -> None:
    cache = make_cache()
    cache.store(TOKENS, oracle.kv(TOKENS))

    def use() -> list[Any]:
        with TieredCache(small_config(tmp_path / "child's"), SMALL_LAYOUT, namespace()) as own:
            own.store(OTHERS, oracle.kv(OTHERS))
            own.flush()
            own.evict("cpu")
            loaded = own.load(OTHERS).result()
            oracle.check(OTHERS, loaded.num_tokens, loaded.kv)
            return [loaded.num_tokens, own.check_integrity()]

    assert in_child(use) == [96, []]
    cache.flush()
    goes_on(cache, oracle)


def test_a_grandchild_is_told_of_the_process_that_has_the_cache(make_cache: MakeCache) -> None:
    cache = make_cache()
    (told,) = set(in_child(lambda: in_child(lambda: answers_of(cache))).values())
    assert f"parent process {os.getpid()};" in told


def test_work_under_way_at_the_fork_ends_in_the_parent(make_chaos: MakeChaos, oracle: CacheOracle) -> None:
    one = make_chaos()
    begun, free = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        free.wait(20)

    one.cache.store(TOKENS, oracle.kv(TOKENS))
    one.cache.flush()
    one.cache.evict("cpu")
    one.node.engine.run_on(Tier.DISK, Job(OpId(0), Priority.LOAD, hold, lambda: None))
    assert begun.wait(20)
    pending = one.cache.load(TOKENS)
    assert in_child(one.cache.close) is True
    free.set()
    loaded = pending.result()
    oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
    assert loaded.num_tokens == 96


def use_in_pool(cache: TieredCache, answers: Any) -> None:
    answers.put((os.getpid(), answers_of(cache), cache.close()))


def test_workers_of_multiprocessing_are_told_too(make_cache: MakeCache, oracle: CacheOracle) -> None:
    cache = make_cache()
    cache.store(TOKENS, oracle.kv(TOKENS))
    cache.flush()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    workers = [context.Process(target=use_in_pool, args=(cache, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(CHILD_DEADLINE_S)
        assert worker.exitcode == 0
    for _ in workers:
        pid, told, closed = answers.get()
        assert pid != os.getpid()
        assert closed
        assert all(f"parent process {os.getpid()};" in answer for answer in told.values())
    answers.close()
    goes_on(cache, oracle)


PARENT = """
    import gc, os, sys
    from pathlib import Path
    from kvtiers.runtime.cache import TieredCache
    from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
    from kvtiers.testing.chaos import namespace, small_config

    oracle, tokens = CacheOracle(namespace()), list(range(100))
    cache = TieredCache(small_config(Path(sys.argv[1])), SMALL_LAYOUT, namespace())
    for number in range(5):
        cache.store(tokens[: 20 * (number + 1)], oracle.kv(tokens[: 20 * (number + 1)]))
        if os.fork() == 0:
            if number % 2:
                del cache
                gc.collect()
            sys.exit(0)  # as any script ends: exit handlers, finalizers, the collector
        _, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == 0, status
    cache.flush()
    assert cache.check_integrity() == []
    assert cache.close()
"""


def test_children_that_end_like_any_script_leave_the_cache_whole(tmp_path: Path, oracle: CacheOracle) -> None:
    path = tmp_path / "cache"
    command = [sys.executable, "-X", "dev", "-c", textwrap.dedent(PARENT), str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert "unclosed" not in ended.stderr
    assert "Traceback" not in ended.stderr
    with TieredCache(small_config(path), SMALL_LAYOUT, namespace()) as cache:
        loaded = cache.load(TOKENS).result()
        assert loaded.num_tokens == 96
        oracle.check(TOKENS, 96, loaded.kv)
        assert cache.check_integrity() == []
