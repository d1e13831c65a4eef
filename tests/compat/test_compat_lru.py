"""The two-tier LRU against a plain model, and its offload hook with and without an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtiers.compat import AsyncOffloadEngine, OutOfMemoryError, TieredLRUPolicy, UnknownTier
from kvtiers.model.errors import ConfigError, InvalidArgument

GIB = 1024**3
WAIT_S = 10.0


def policy_of(gpu: int, cpu: int, threshold: float = 1.0, **options: Any) -> TieredLRUPolicy:
    """Capacities in bytes."""
    return TieredLRUPolicy(gpu / GIB, cpu / GIB, threshold, **options)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


class Hook:
    """Notes its calls; each ends when `released` is set."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.error = error
        self.released = threading.Event()
        self.released.set()

    async def offload(self, key: str, tier: str) -> None:
        self.calls.append((key, tier))
        for _ in range(5000):
            if self.released.is_set():
                break
            await asyncio.sleep(0.002)
        if self.error is not None:
            raise self.error


# --- the policy ----------------------------------------------------------------------------------------------------------


def test_the_listing_works_as_it_stands() -> None:
    policy = TieredLRUPolicy(gpu_capacity_gb=2.0, cpu_capacity_gb=4.0)
    assert (policy.gpu_capacity, policy.cpu_capacity, policy.threshold) == (2 * GIB, 4 * GIB, 0.8)
    half = GIB // 2
    assert policy.insert("a", half, "gpu") == []
    assert policy.insert("b", half, "gpu") == []
    policy.access("a", "gpu")
    assert policy.insert("c", 3 * half, "gpu") == [("b", half, "gpu"), ("a", half, "gpu")]
    assert list(policy.gpu_lru.items()) == [("c", 3 * half)]
    assert dict(policy.cpu_lru) == {"b": half, "a": half}
    assert "b" in policy.cpu_lru
    assert sum(policy.cpu_lru.values()) == GIB == policy.usage("cpu")


def test_what_falls_out_of_the_cpu_tier_is_told_too() -> None:
    policy = policy_of(100, 100)
    policy.insert("a", 60, "gpu")
    policy.insert("b", 60, "gpu")
    assert policy.insert("c", 60, "gpu") == [("b", 60, "gpu"), ("a", 60, "cpu")]
    assert (list(policy.gpu_lru), list(policy.cpu_lru)) == (["c"], ["b"])


def test_a_key_too_large_for_the_cpu_tier_leaves_both_at_once() -> None:
    policy = policy_of(100, 50)
    policy.insert("large", 60, "gpu")
    assert policy.insert("b", 60, "gpu") == [("large", 60, "gpu"), ("large", 60, "cpu")]
    assert list(policy.cpu_lru) == []


def test_an_item_larger_than_its_tier_is_refused_and_evicts_nothing() -> None:
    policy = policy_of(100, 100, 0.8)
    policy.insert("a", 40, "gpu")
    for size in (81, 1000):
        with pytest.raises(OutOfMemoryError, match="never fits"):
            policy.insert("b", size, "gpu")
        with pytest.raises(OutOfMemoryError):
            policy.insert("a", size, "gpu")
    assert dict(policy.gpu_lru) == {"a": 40}
    assert policy.insert("b", 80, "gpu") == [("a", 40, "gpu")]


def test_inserting_a_key_again_changes_its_size_and_counts_once() -> None:
    policy = policy_of(100, 100)
    policy.insert("a", 40, "gpu")
    policy.insert("b", 40, "gpu")
    assert policy.insert("a", 60, "gpu") == []
    assert policy.usage("gpu") == 100
    assert list(policy.gpu_lru) == ["b", "a"]
    assert policy.insert("a", 61, "gpu") == [("b", 40, "gpu")]
    assert policy.usage("gpu") == 61


def test_a_key_with_a_copy_in_cpu_memory_is_not_moved_again() -> None:
    hook = Hook()
    policy = policy_of(100, 300, async_offloader=hook)
    policy.insert("a", 60, "cpu")
    policy.insert("b", 60, "cpu")
    policy.insert("a", 60, "gpu")
    assert policy.insert("c", 60, "gpu") == [("a", 60, "gpu")]
    assert list(policy.cpu_lru) == ["b", "a"]
    assert hook.calls == []
    policy.insert("c", 70, "gpu")
    policy.insert("c", 80, "cpu")  # a copy of another size is not a copy
    policy.insert("d", 60, "gpu")
    wait_until(lambda: hook.calls == [("c", "cpu")])
    assert policy.cpu_lru["c"] == 70
    policy.close()


def test_unknown_tiers_are_refused_and_unknown_keys_ignored() -> None:
    policy = policy_of(100, 100)
    calls: list[Callable[[], object]] = [
        lambda: policy.insert("a", 1, "disk"),
        lambda: policy.access("a", "GPU"),
        lambda: policy.remove("a", ""),
        lambda: policy.usage("remote"),
    ]
    for call in calls:
        with pytest.raises(UnknownTier, match="'gpu' and 'cpu'"):
            call()
    policy.access("nobody", "gpu")
    assert policy.remove("nobody", "cpu") is False
    with pytest.raises(InvalidArgument):
        policy.insert("a", -1, "gpu")


def test_bad_arguments_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        TieredLRUPolicy(-1, -2, 1.5, offload_timeout_s=0)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("size", [float("nan"), float("inf"), 1.5, True, "x", None, -1])
def test_what_is_no_size_is_refused_and_changes_nothing(size: Any) -> None:
    policy = policy_of(100, 100)
    policy.insert("a", 1, "gpu")
    with pytest.raises(InvalidArgument, match="size of 'b'"):
        policy.insert("b", size, "gpu")
    assert list(policy.gpu_lru.items()) == [("a", 1)]
    assert policy.check_integrity() == []


def test_the_orders_can_be_read_and_not_written() -> None:
    policy = policy_of(100, 100)
    policy.insert("a", 1, "gpu")
    with pytest.raises(TypeError):
        cast("Any", policy.gpu_lru)["a"] = 2
    with pytest.raises(AttributeError):
        cast("Any", policy).gpu_lru = {}
    with pytest.raises(KeyError):
        policy.gpu_lru["b"]


class Model:
    """The same rules with a sum over all entries at each insert."""

    def __init__(self, gpu: int, cpu: int) -> None:
        self.ceilings = {"gpu": gpu, "cpu": cpu}
        self.lru: dict[str, OrderedDict[str, int]] = {"gpu": OrderedDict(), "cpu": OrderedDict()}

    def insert(self, key: str, size: int, tier: str) -> list[tuple[str, int, str]]:
        lru, evicted = self.lru[tier], list[tuple[str, int, str]]()
        lru.pop(key, None)
        while sum(lru.values()) + size > self.ceilings[tier]:
            oldest, nbytes = lru.popitem(last=False)
            evicted.append((oldest, nbytes, tier))
            if tier == "gpu":
                evicted += self.demote(oldest, nbytes)
        lru[key] = size
        return evicted

    def demote(self, key: str, size: int) -> list[tuple[str, int, str]]:
        if self.lru["cpu"].pop(key, None) == size:
            self.lru["cpu"][key] = size
            return []
        if size > self.ceilings["cpu"]:
            return [(key, size, "cpu")]
        return self.insert(key, size, "cpu")


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "insert", "access", "remove"]),
        st.sampled_from("abcdefgh"),
        st.integers(0, 60),
        st.sampled_from(["gpu", "cpu"]),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_it_does_what_the_plain_model_does(steps: list[tuple[str, str, int, str]]) -> None:
    policy, model = policy_of(100, 50), Model(100, 50)
    for what, key, size, tier in steps:
        if what == "access":
            policy.access(key, tier)
            if key in model.lru[tier]:
                model.lru[tier].move_to_end(key)
        elif what == "remove":
            assert policy.remove(key, tier) is (model.lru[tier].pop(key, None) is not None)
        elif size > model.ceilings[tier]:
            with pytest.raises(OutOfMemoryError):
                policy.insert(key, size, tier)
        else:
            assert policy.insert(key, size, tier) == model.insert(key, size, tier)
        assert list(policy.gpu_lru.items()) == list(model.lru["gpu"].items())
        assert list(policy.cpu_lru.items()) == list(model.lru["cpu"].items())
        assert policy.usage("gpu") == sum(model.lru["gpu"].values())
        assert policy.check_integrity() == []


def test_an_insert_looks_only_at_what_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: evicting one of 2,000 keys asks for one victim, and walks over nothing."""
    policy = policy_of(2000, 0)
    for number in range(2000):
        policy.insert(str(number), 1, "gpu")
    asked: list[str | None] = []
    victim = policy._gpu.order.victim

    def counted(now: float, may_go: Callable[[str], bool]) -> str | None:
        asked.append(victim(now, may_go))
        return asked[-1]

    monkeypatch.setattr(policy._gpu.order, "victim", counted)
    monkeypatch.setattr(policy._gpu.order, "coldest_first", lambda: pytest.fail("walked over all keys"))
    monkeypatch.setattr(policy._gpu, "sizes", _Unwalkable(policy._gpu.sizes))
    for number in range(2000, 2100):
        policy.insert(str(number), 1, "gpu")
    assert asked == [str(number) for number in range(100)]


class _Unwalkable(dict[str, int]):
    def __iter__(self) -> Any:
        pytest.fail("walked over all sizes")

    values = items = keys = __iter__


def test_eight_threads_keep_the_books_right() -> None:
    policy = policy_of(5000, 3000)
    errors: list[BaseException] = []

    def work(mark: int) -> None:
        try:
            for turn in range(300):
                policy.insert(f"{turn % 40}", 10 * (1 + (turn + mark) % 30), ("gpu", "cpu")[turn % 2])
                policy.access(f"{(turn + mark) % 40}", "gpu")
                assert sum(policy.gpu_lru.values()) <= 5000
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert policy.check_integrity() == []


# --- the hook ------------------------------------------------------------------------------------------------------------


def test_the_hook_is_called_from_a_plain_thread() -> None:
    hook = Hook()
    policy = policy_of(100, 1000)
    policy.async_offloader = hook
    for key in "abc":
        policy.insert(key, 60, "gpu")
    wait_until(lambda: hook.calls == [("a", "cpu"), ("b", "cpu")])
    wait_until(lambda: not policy._moving)
    policy.close()
    assert not [thread for thread in threading.enumerate() if "lru-offload" in thread.name]


def test_the_hook_is_called_on_the_running_loop_if_there_is_one() -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    class OnLoop:
        async def offload(self, key: str, tier: str) -> None:
            loops.append(asyncio.get_running_loop())

    async def main() -> asyncio.AbstractEventLoop:
        policy = policy_of(100, 1000, async_offloader=OnLoop())
        policy.insert("a", 60, "gpu")
        policy.insert("b", 60, "gpu")
        for _ in range(10):
            await asyncio.sleep(0)
        assert not policy._moving
        assert policy._hook._background is None
        return asyncio.get_running_loop()

    loop = asyncio.run(main())
    assert loops == [loop]


def test_a_plain_function_may_be_the_hook() -> None:
    calls: list[tuple[str, str]] = []

    class Plain:
        def offload(self, key: str, tier: str) -> Awaitable[object] | None:
            calls.append((key, tier))
            return None

    policy = policy_of(100, 1000, async_offloader=Plain())
    policy.insert("a", 60, "gpu")
    policy.insert("b", 60, "gpu")
    assert calls == [("a", "cpu")]
    assert policy._hook._background is None


def test_a_key_whose_offload_fails_stays_on_the_gpu_and_is_tried_again_at_its_next_eviction() -> None:
    hook = Hook(OSError("disk on fire"))
    policy = policy_of(200, 1000, 0.5, async_offloader=hook)
    hook.released.clear()
    policy.insert("a", 60, "gpu")
    assert policy.insert("b", 60, "gpu") == [("a", 60, "gpu")]
    assert list(policy.cpu_lru) == ["a"]
    hook.released.set()
    wait_until(lambda: policy.offload_failures == 1)
    assert (list(policy.gpu_lru), list(policy.cpu_lru)) == (["a", "b"], [])
    hook.error = None
    assert policy.insert("c", 10, "gpu") == [("a", 60, "gpu")]
    wait_until(lambda: not policy._moving)
    assert hook.calls == [("a", "cpu")] * 2
    assert list(policy.cpu_lru) == ["a"]
    assert policy.check_integrity() == []
    policy.close()


def test_a_hook_that_refuses_at_once_is_set_right_in_the_answer() -> None:
    class Refuses:
        def offload(self, key: str, tier: str) -> Awaitable[object] | None:
            raise OSError("no")

    policy = policy_of(200, 1000, 0.5, async_offloader=Refuses())
    policy.insert("a", 60, "gpu")
    assert policy.insert("b", 60, "gpu") == []  # a has not left
    assert list(policy.gpu_lru) == ["a", "b"]
    assert policy.insert("c", 90, "gpu") == [
        ("b", 60, "gpu"),
        ("b", 60, "cpu"),
    ]  # 90 + a's 60, no room for b's
    assert (list(policy.gpu_lru), list(policy.cpu_lru)) == (["a", "c"], [])
    for number in range(50):
        policy.insert(str(number), 90, "gpu")
    assert policy.usage("gpu") <= policy.gpu_capacity
    assert policy.check_integrity() == []


def test_a_key_that_came_back_to_the_gpu_before_its_offload_failed_is_moved_again() -> None:
    """Or CPU memory would be said to have bytes that never arrived there."""
    hook = Hook(OSError("late"))
    hook.released.clear()
    policy = policy_of(200, 1000, 0.5, async_offloader=hook)
    policy.insert("a", 60, "gpu")
    policy.insert("b", 60, "gpu")
    policy.insert("a", 60, "gpu")  # evicts b
    assert "a" in policy.cpu_lru  # its first offload is still under way
    hook.released.set()
    wait_until(lambda: policy.offload_failures == 2)
    assert "a" not in policy.cpu_lru
    hook.error = None
    policy.insert("c", 60, "gpu")
    wait_until(lambda: not policy._moving)
    assert hook.calls[-1] == ("a", "cpu")
    assert "a" in policy.cpu_lru
    assert policy.check_integrity() == []
    policy.close()


def test_a_late_failure_does_not_touch_a_key_that_came_back() -> None:
    hook = Hook(OSError("late"))
    hook.released.clear()
    policy = policy_of(100, 1000, async_offloader=hook)
    policy.insert("a", 60, "gpu")
    policy.insert("b", 60, "gpu")
    policy.insert("a", 30, "cpu")  # somebody stored it there meanwhile
    hook.released.set()
    wait_until(lambda: policy.offload_failures == 1)
    assert dict(policy.cpu_lru) == {"a": 30}
    assert "a" not in policy.gpu_lru
    policy.close()


def test_a_loop_that_ends_before_the_offload_counts_as_a_failure() -> None:
    hook = Hook()
    hook.released.clear()
    policy = policy_of(200, 1000, 0.5, async_offloader=hook)

    async def main() -> None:
        policy.insert("a", 60, "gpu")
        policy.insert("b", 60, "gpu")
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert policy.offload_failures == 1
    assert list(policy.gpu_lru) == ["a", "b"]
    assert not policy._hook._under_way


def test_an_offload_that_hangs_is_given_up_at_its_deadline() -> None:
    hook = Hook()
    hook.released.clear()
    policy = policy_of(200, 1000, 0.5, async_offloader=hook, offload_timeout_s=0.05)
    policy.insert("a", 60, "gpu")
    policy.insert("b", 60, "gpu")
    wait_until(lambda: policy.offload_failures == 1)
    assert list(policy.gpu_lru) == ["a", "b"]
    policy.close()


def test_after_close_the_hook_is_not_called_from_plain_threads() -> None:
    hook = Hook()
    policy = policy_of(200, 1000, 0.5, async_offloader=hook)
    policy.insert("a", 60, "gpu")
    policy.insert("b", 60, "gpu")
    wait_until(lambda: len(hook.calls) == 1)
    policy.close()
    policy.close()
    policy.insert("c", 60, "gpu")
    assert policy.offload_failures == 1
    assert "b" in policy.gpu_lru


def test_the_offload_engine_is_a_hook() -> None:
    """Evicted from the GPU, the bytes are in CPU memory; a key without data stays where it was."""
    data = {"a": b"a" * 60, "b": b"b" * 60}
    with AsyncOffloadEngine(2, 10, source=lambda key: data[key], cpu_pool_gb=1 / 1024) as engine:
        policy = policy_of(200, 1000, 0.5, async_offloader=engine)
        for key in ("a", "b", "lost", "d"):
            policy.insert(key, 60, "gpu")
        wait_until(lambda: policy.offload_failures == 1 and not policy._moving)
        assert list(policy.cpu_lru) == ["a", "b"]
        assert list(policy.gpu_lru) == ["lost", "d"]
        assert asyncio.run(engine.backend("cpu").read("a")) == data["a"]
        policy.close()
