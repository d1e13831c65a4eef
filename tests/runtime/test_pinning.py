"""A node whose pool lies on a real device pins its arena. No GPU is at hand: the device is the CPU, and CUDA's two calls are counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch

from kvtiers.memory import cuda
from kvtiers.memory.cuda import DevicePool
from kvtiers.memory.mapping import CloseOutcome
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import MIB, namespace, small_config, wait_until

TOKENS = list(range(100))


class Cudart:
    """Counts what is pinned. `hold`: stands in the call, as CUDA does for a large piece."""

    def __init__(self) -> None:
        self.pieces: dict[int, int] = {}
        self.error = 0
        self.called = threading.Event()
        self.hold = threading.Event()
        self.hold.set()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int, /) -> int:  # noqa: N802
        self.called.set()
        assert self.hold.wait(60)
        if not self.error:
            self.pieces[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int, /) -> int:  # noqa: N802
        del self.pieces[address]
        return 0


class AtOnce:
    """Copies that have ended when the call returns; `stuck`: they say they have not."""

    stuck = False

    def issue(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self) -> AtOnce:
        return self

    def query(self) -> bool:
        return not self.stuck


class PretendedGpu(DevicePool):
    """Host memory that claims to be a device."""

    @property
    def simulated(self) -> bool:
        return False


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    made = Cudart()
    monkeypatch.setattr(cuda, "_runtime_of", lambda device: made)
    monkeypatch.setattr(cuda, "_free_on", lambda device: 1 << 40)
    monkeypatch.setattr(cuda, "_PINNED", [])
    return made


@pytest.fixture
def make_node() -> Iterator[Callable[..., CacheNode]]:
    nodes: list[CacheNode] = []

    def make(order: AtOnce | None = None, *, simulated: bool = False) -> CacheNode:
        kind = DevicePool if simulated else PretendedGpu
        plan = plan_node(small_config(None, {"gpu.capacity": "1Mi", "gpu.device": "cpu"}))
        assert plan.core.gpu is not None
        nbytes = plan.core.gpu.capacity
        node = CacheNode(replace(plan, device_pool=lambda: kind(nbytes, "cpu", order=order or AtOnce())))
        nodes.append(node)
        return node

    yield make
    closed = [node.close() for node in nodes]
    assert all(closed)


def pinned(node: CacheNode) -> int:
    nbytes: int = node.stats()["arena"]["pinned_bytes"]
    return nbytes


def test_the_arena_is_pinned_in_the_background_and_unpinned_at_close(
    runtime: Cudart, make_node: Callable[..., CacheNode]
) -> None:
    oracle = CacheOracle(namespace())
    runtime.hold.clear()
    node = make_node()  # does not wait for CUDA
    assert runtime.called.wait(20)
    cache = TieredCache(
        small_config(None, {"gpu.capacity": "1Mi", "gpu.device": "cpu"}), SMALL_LAYOUT, namespace(), node=node
    )
    for again in range(2):  # before it is pinned, and after
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()
        cache.evict("gpu")
        loaded = cache.load(TOKENS).result()
        assert loaded.num_tokens == 96
        oracle.check(TOKENS, 96, loaded.kv)
        if not again:
            assert pinned(node) == 0
            runtime.hold.set()
            assert wait_until(lambda: pinned(node) == MIB)
    address = node.arena.view(0, 1).ctypes.data
    assert runtime.pieces == {address: MIB}
    cache.close()
    assert node.close()
    assert runtime.pieces == {}
    assert node.arena.close() is CloseOutcome.UNMAPPED


def test_a_simulated_pool_pins_nothing(runtime: Cudart, make_node: Callable[..., CacheNode]) -> None:
    node = make_node(simulated=True)
    assert "kvtiers-pin" not in {thread.name for thread in threading.enumerate()}
    assert node.close()
    assert not runtime.called.is_set()


def test_a_refusal_is_told_and_costs_nothing_else(
    runtime: Cudart, make_node: Callable[..., CacheNode], caplog: pytest.LogCaptureFixture
) -> None:
    runtime.error = 2
    node = make_node()
    assert wait_until(lambda: "the arena is not pinned for cpu" in caplog.text)
    assert "cudaError 2" in caplog.text
    assert pinned(node) == 0
    assert node.close()


def test_what_torch_raises_is_a_refusal_too(
    runtime: Cudart,
    make_node: Callable[..., CacheNode],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(device: torch.device) -> Cudart:
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(cuda, "_runtime_of", broken)
    make_node()
    assert wait_until(lambda: "CUDA driver initialization failed" in caplog.text)


def test_memory_that_a_copy_may_still_use_stays_pinned_and_mapped(
    runtime: Cudart, make_node: Callable[..., CacheNode]
) -> None:
    order = AtOnce()
    node = make_node(order)
    assert wait_until(lambda: pinned(node) == MIB)
    pool = node.device_pool
    assert pool is not None
    order.stuck = True
    pool._deadline_s = 0.01  # type: ignore[misc]
    with pytest.raises(cuda.CopyInFlight):
        pool.copy_to_host(0, node.arena.view(0, 4096))
    node.close()
    assert runtime.pieces != {}
    assert node.arena.close() is CloseOutcome.LEAKED
    order.stuck = False


def test_closing_does_not_wait_for_cuda_beyond_its_time(
    runtime: Cudart, make_node: Callable[..., CacheNode]
) -> None:
    runtime.hold.clear()
    node = make_node()
    assert runtime.called.wait(20)
    node.close(0.1)
    assert node.closed
    assert node.arena.close() is CloseOutcome.LEAKED
    runtime.hold.set()
