"""Any backend of the LMCache-compatible contract as a record store, and as a tier of a real cache."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from kvtiers import CacheConfig, CacheNode, KVLayout, Namespace, Tier, TieredCache
from kvtiers.compat import (
    BackendStore,
    DiskBackend,
    StorageBackend,
    UnknownTier,
    backend_store,
    with_backend_tier,
)
from kvtiers.compat.backend_store import key_of
from kvtiers.model.errors import (
    ConfigError,
    RecordCorrupt,
    RecordForeign,
    RecordMissing,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.none import NoCodec
from kvtiers.records.codecs.registry import codec_for
from kvtiers.records.sealing import UnknownCodec
from kvtiers.runtime.plan import plan_node
from kvtiers.stores.base import RecordStore
from kvtiers.stores.registry import RemoteSettings
from kvtiers.testing.disk_damage import damage_file
from kvtiers.testing.store_kit import Damage, RecordStoreContract, make_part, reads_back, slot


class FolderBackend(StorageBackend):
    """A plain backend as people write them: one file a key, replaced by rename."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._numbers = iter(range(1 << 30))

    async def write(self, key: str, data: bytes) -> bool:
        assert type(data) is bytes
        temporary = self.folder / f"{next(self._numbers)}.tmp"
        temporary.write_bytes(data)
        temporary.rename(self.folder / key)
        return True

    async def read(self, key: str) -> bytes | None:
        path = self.folder / key
        return path.read_bytes() if path.is_file() else None

    async def delete(self, key: str) -> bool:
        try:
            (self.folder / key).unlink()
        except FileNotFoundError:
            return False
        return True

    async def exists(self, key: str) -> bool:
        return (self.folder / key).is_file()


class _Contract(RecordStoreContract):
    listable = False

    def test_a_second_store_finds_all_of_the_first(self, store: RecordStore, place: Path) -> None:
        """As the kit's, but for the count: a backend can't be listed, so a new store knows of no record before it asks."""
        parts = [make_part(number, 5000) for number in range(6)]
        for part in parts:
            store.write(part)
        store.delete(parts[3].ref)
        again = self.reopen(store, place)
        try:
            assert again.usage().records == 0
            assert again.exists([part.ref for part in parts]) == [True, True, True, False, True, True]
            assert all(reads_back(again, part) for part in parts if part is not parts[3])
        finally:
            again.close()


class TestOverAFolder(_Contract):
    @pytest.fixture(autouse=True, params=["none", "zstd"])
    def codec(self, request: pytest.FixtureRequest) -> None:
        self.codec_name: str = request.param

    def make_store(self, place: Path) -> RecordStore:
        return BackendStore(FolderBackend(place), codec=codec_for(self.codec_name))

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        assert isinstance(store, BackendStore)
        backend = store._backend
        assert isinstance(backend, FolderBackend)
        others = [path for path in backend.folder.iterdir() if path.name != key_of(ref)]
        damage_file(backend.folder / key_of(ref), how, others[0] if others else None)


class TestOverADiskBackend(_Contract):
    """Sealed twice, which costs a page, and shows that the contract goes round."""

    sizes = (1, 4096, 4097, 300_001)
    test_a_damaged_record_is_a_miss_and_heals = None  # type: ignore[assignment]  # the backend finds it out itself
    test_damage_between_two_runs_is_a_miss = None  # type: ignore[assignment]

    @pytest.fixture(autouse=True)
    def close_backends(self) -> Any:
        self.backends: list[DiskBackend] = []
        yield
        for backend in self.backends:
            backend.close()

    def make_store(self, place: Path) -> RecordStore:
        self.backends.append(DiskBackend(place, "none"))
        return BackendStore(self.backends[-1])


# --- backends that misbehave ---------------------------------------------------------------------------------------------


class Scripted(StorageBackend):
    """Does what `act` says."""

    def __init__(self, act: Callable[[str], Coroutine[Any, Any, Any]]) -> None:
        self.act = act

    async def write(self, key: str, data: bytes) -> bool:
        answer: bool = await self.act("write")
        return answer

    async def read(self, key: str) -> bytes | None:
        answer: bytes | None = await self.act("read")
        return answer

    async def delete(self, key: str) -> bool:
        answer: bool = await self.act("delete")
        return answer

    async def exists(self, key: str) -> bool:
        answer: bool = await self.act("exists")
        return answer


def _raising(error: Exception) -> Scripted:
    async def act(_: str) -> object:
        raise error

    return Scripted(act)


def _answering(answer: object) -> Scripted:
    async def act(_: str) -> object:
        return answer

    return Scripted(act)


PART = make_part(1, 5000)
CALLS: list[Callable[[RecordStore], object]] = [
    lambda store: store.write(PART),
    lambda store: reads_back(store, PART),
    lambda store: store.delete(PART.ref),
    lambda store: store.exists([PART.ref]),
]


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (OSError("disk on fire"), StoreTransient),
        (TimeoutError("slow"), StoreTransient),
        (ValueError("a bug"), StoreTransient),
        (ConnectionRefusedError("nobody there"), StoreUnavailable),
        (StoreFull("full"), StoreFull),
    ],
)
def test_what_a_backend_raises_becomes_an_error_of_the_contract(
    raised: Exception, told: type[Exception]
) -> None:
    store = BackendStore(_raising(raised))
    store.open()
    for call in CALLS:
        with pytest.raises(told, match=str(raised)):
            call(store)
    with pytest.raises((StoreUnavailable, StoreFull)):
        store.probe()
    assert store.usage().records == 0
    store.close()


@pytest.mark.parametrize("answer", ["text", 7, b"", b"short", b"x" * 8192, bytearray(3), bytes(1 << 20)])
def test_an_answer_that_is_no_record_is_corrupt_or_foreign(answer: object) -> None:
    store = BackendStore(_answering(answer))
    store.open()
    with pytest.raises((RecordCorrupt, RecordForeign)):
        reads_back(store, PART)
    assert store.stats()["corrupt"] == 1
    store.close()


class _Elsewhere(NoCodec):
    """Of a package that is not installed where the record is read."""

    name: ClassVar[str] = "elsewhere"

    def encode(self, payload: memoryview, out: memoryview, itemsize: int) -> int:
        return super().encode(payload[: len(payload) // 4], out, itemsize)


def test_a_record_that_others_can_read_is_left_to_them(tmp_path: Path) -> None:
    backend = FolderBackend(tmp_path)
    store = BackendStore(backend, codec=_Elsewhere())
    store.open()
    store.write(PART)
    with pytest.raises(UnknownCodec):
        reads_back(store, PART)
    assert store.exists([PART.ref]) == [True]
    assert store.stats()["corrupt"] == 0
    store.close()


def test_a_bad_record_that_cant_be_removed_is_still_a_bad_record() -> None:
    async def act(what: str) -> object:
        if what == "delete":
            raise OSError("read-only")
        return b"x" * 8192

    store = BackendStore(Scripted(act))
    store.open()
    with pytest.raises((RecordCorrupt, RecordForeign)):
        reads_back(store, PART)
    assert (store.stats()["corrupt"], store.stats()["not_removed"]) == (1, 1)
    store.close()


@pytest.mark.parametrize("connections", [1, 3])
def test_no_more_calls_at_a_time_than_connections(connections: int) -> None:
    now, most = 0, 0

    async def act(_: str) -> object:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.002)
        now -= 1
        return False

    store = Scripted(act).as_record_store(RemoteSettings("", 10.0, connections, NoCodec()))
    store.open()
    refs = [make_part(number, 3000).ref for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        asked: list[Future[Any]] = [pool.submit(store.exists, refs) for _ in range(2)]
        asked += [pool.submit(store.delete, ref) for ref in refs]
        for one in asked:
            one.result(60)
    assert most == connections
    assert store.stats()["connection_waits"] > 0
    store.close()


def test_what_is_counted_of_a_backend_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_store, "_MOST_KNOWN", 3)
    store = BackendStore(FolderBackend(tmp_path))
    store.open()
    taken = [store.write(make_part(number, 3000 + 5000 * number)) for number in range(5)]
    assert store.usage().records == 3
    assert store.usage().used_bytes == sum(taken[-3:])
    store.close()


def test_a_refusal_is_no_success() -> None:
    store = BackendStore(_answering(False))
    store.open()
    with pytest.raises(StoreTransient, match="refused"):
        store.write(PART)
    assert store.usage().records == 0
    store.close()


def test_a_hanging_backend_costs_a_deadline_and_is_cancelled() -> None:
    cancelled = threading.Event()

    async def act(_: str) -> object:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return None

    store = BackendStore(Scripted(act), timeout_s=0.05)
    store.open()
    with pytest.raises(StoreTransient, match="no answer within"):
        store.write(PART)
    assert cancelled.wait(20)
    store.close()
    assert not [thread for thread in threading.enumerate() if "backend-loop" in thread.name]


def test_a_backend_that_blocks_its_loop_costs_deadlines_only() -> None:
    released = threading.Event()

    async def act(_: str) -> object:
        released.wait(20)  # what such a backend does wrong
        return None

    store = BackendStore(Scripted(act), timeout_s=0.05)
    store.open()
    for _ in range(2):
        with pytest.raises(StoreTransient):
            store.exists([PART.ref])
    released.set()
    store.close()


def test_closing_ends_what_is_under_way() -> None:
    begun = threading.Event()

    async def act(_: str) -> object:
        begun.set()
        await asyncio.sleep(60)
        return None

    store = BackendStore(Scripted(act), timeout_s=30)
    store.open()
    told: list[Exception] = []

    def read() -> None:
        try:
            reads_back(store, PART)
        except StoreUnavailable as error:
            told.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(20)
    store.close()
    thread.join(20)
    assert len(told) == 1


def test_a_store_is_opened_before_it_is_used(tmp_path: Path) -> None:
    store = BackendStore(FolderBackend(tmp_path))
    with pytest.raises(StoreUnavailable, match="not open"):
        store.write(PART)


def test_the_backend_stays_on_one_loop() -> None:
    loops = set()

    async def act(what: str) -> object:
        loops.add(asyncio.get_running_loop())
        return what == "exists"

    store = BackendStore(Scripted(act))
    store.open()
    threads = [threading.Thread(target=lambda: store.exists([PART.ref] * 100)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(loops) == 1
    store.close()


def test_missing_is_missing(tmp_path: Path) -> None:
    store = BackendStore(FolderBackend(tmp_path))
    store.open()
    store.write(PART)
    (tmp_path / key_of(PART.ref)).unlink()
    with pytest.raises(RecordMissing):
        store.read_into(PART.ref, slot(5000), 5000)
    assert store.usage() == (0, 0, None)
    store.close()


# --- as a tier -----------------------------------------------------------------------------------------------------------

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=16, dtype="float16")
NAMESPACE = Namespace(model="m", fingerprint="f", engine="test")
CONFIG = {"storage": {"chunk_tokens": 16, "cpu": {"buffer_size": "4Mi"}, "disk": {"enabled": False}}}


@pytest.mark.parametrize("tier", [Tier.DISK, Tier.REMOTE])
def test_a_backend_is_a_tier_of_the_cache(tmp_path: Path, tier: Tier) -> None:
    config = CacheConfig.from_mapping(CONFIG, environ={})
    plan = with_backend_tier(plan_node(config), FolderBackend(tmp_path), 64 << 20, tier=tier)
    tokens = list(range(64))
    kv = np.random.default_rng(1).random(LAYOUT.shape(64)).astype(np.float16)
    node = CacheNode(plan)
    with TieredCache(config, LAYOUT, NAMESPACE, node=node) as cache:
        assert cache.store(tokens, kv).accepted == 4
        cache.flush()
        assert len(list(tmp_path.iterdir())) == 4
        cache.evict("cpu")
        loaded = cache.load(tokens).result(20)
        assert loaded.tiers == (tier,) * 4
        assert np.array_equal(loaded.kv, kv)
        cache.flush()
        cache.evict("cpu")
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:-1] + b"\1")
        assert cache.load(tokens).result(20).num_tokens == 0  # damaged: computed anew, never served
        deadline = time.monotonic() + 20
        while list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.002)
        assert node.check_integrity() == []
    node.close()


def test_a_backend_can_t_be_memory() -> None:
    plan = plan_node(CacheConfig.from_mapping(CONFIG, environ={}))
    with pytest.raises(UnknownTier):
        with_backend_tier(plan, _answering(None), 1, tier="cpu")
    with pytest.raises(ConfigError):
        with_backend_tier(plan, _answering(None), 0)
