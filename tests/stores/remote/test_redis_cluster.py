"""Records in a real Valkey cluster of three shards, and what becomes of them when one shard is lost."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from kvtiers.model.errors import RecordMissing, StoreTransient, StoreUnavailable
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore, SealedPart
from kvtiers.stores.redis import RedisSettings, redis_store
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.remote_kit import Address, comes_back, ends
from kvtiers.testing.sealed_parts import make_part, reads_back
from kvtiers.testing.servers.process import RemoteEngine
from kvtiers.testing.servers.valkey import ValkeyCluster
from kvtiers.testing.valkey_kit import PASSWORD, ValkeyContract, settings_for

PATIENCE_S = 30.0


def cluster_settings(address: Address, timeout_s: float = 1.0) -> RedisSettings:
    host, port = address
    return settings_for(address, timeout_s, endpoint=f"redis-cluster://{host}:{port}", password=PASSWORD)


class TestCluster(ValkeyContract):
    cannot_crawl = "the nodes are reached at the addresses that the cluster gives, past a relay"

    @classmethod
    def start_engine(cls, folder: Path) -> RemoteEngine:
        cluster = ValkeyCluster(folder, password=PASSWORD)
        cluster.start()
        return cluster

    def settings(self, address: Address, timeout_s: float) -> RedisSettings:
        return cluster_settings(address, timeout_s)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    cluster = ValkeyCluster(tmp_path_factory.mktemp("kvt") / "c", password=PASSWORD)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(started: ValkeyCluster) -> Iterator[ValkeyCluster]:
    started.start()
    started.clear()
    yield started
    started.resume()


@pytest.fixture
def store(cluster: ValkeyCluster) -> Iterator[RecordStore]:
    store = redis_store(cluster_settings(cluster.address), codec_for("none"))
    store.open()
    yield store
    store.close()


def by_shard(cluster: ValkeyCluster, which: int) -> tuple[list[SealedPart], list[SealedPart]]:
    """Parts that this shard has, and parts that others have."""
    parts = [make_part(number, 70_000 + number) for number in range(24)]
    node = cluster.nodes[which]
    here = [part for part in parts if cluster.node_of(f"{{{part.ref.key.hex()}}}") is node]
    assert 2 < len(here) < 22
    return here, [part for part in parts if part not in here]


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("how", ["kill", "pause"])
def test_two_shards_of_three_go_on_and_the_third_is_a_miss_until_it_is_back(
    cluster: ValkeyCluster, store: RecordStore, which: int, how: str
) -> None:
    lost, kept = by_shard(cluster, which)
    for part in lost + kept:
        store.write(part)
    refs = [part.ref for part in lost + kept]
    node = cluster.nodes[which]
    if how == "kill":
        node.kill()
    else:
        node.pause()

    assert ends(lambda: store.exists(refs)) == [False] * len(lost) + [True] * len(kept)
    for part in kept:
        assert ends(partial(reads_back, store, part))
        ends(partial(store.write, part))
    ends(store.probe)
    for part in lost[:3]:
        with pytest.raises(RecordMissing):
            ends(partial(reads_back, store, part))
        with pytest.raises((StoreUnavailable, StoreTransient)):
            ends(partial(store.write, part))
    assert store.stats()["lost_shard"] > 0

    node.resume()
    cluster.start()
    newer = make_part(77, 5000)
    assert wait_until(partial(all_written, store, [*lost, *kept, newer]), PATIENCE_S)
    assert store.exists([*refs, newer.ref]) == [True] * (len(refs) + 1)
    assert all(reads_back(store, part) for part in [*lost, *kept, newer])


def test_what_a_stopped_shard_has_is_there_when_it_goes_on(
    cluster: ValkeyCluster, store: RecordStore
) -> None:
    lost, kept = by_shard(cluster, 1)
    for part in lost:
        store.write(part)
    cluster.nodes[1].pause()
    assert not any(ends(lambda: store.exists([part.ref for part in [*lost, *kept]])))
    assert not any(ends(lambda: store.exists([part.ref for part in lost])))
    cluster.nodes[1].resume()
    assert wait_until(
        lambda: all(comes_back(store, part.ref, bytes(part.payload)) for part in lost), PATIENCE_S
    )


def all_written(store: RecordStore, parts: list[SealedPart]) -> bool:
    try:
        for part in parts:
            store.write(part)
    except (StoreUnavailable, StoreTransient):
        return False
    return True


def test_a_slot_that_has_moved_is_followed(cluster: ValkeyCluster, store: RecordStore) -> None:
    (part, *_), _ = by_shard(cluster, 0)
    store.write(part)
    slot = int(cluster.nodes[0].execute("CLUSTER", "KEYSLOT", f"{{{part.ref.key.hex()}}}"))
    move_slot(cluster, slot, 0, 1)
    try:
        assert reads_back(store, part)
        assert store.exists([part.ref]) == [True]
        assert store.stats()["moved"] == 1
    finally:
        move_slot(cluster, slot, 1, 0)
    assert reads_back(store, part)


def test_a_slot_on_the_move_is_a_miss_and_the_rest_of_its_shard_goes_on(
    cluster: ValkeyCluster, store: RecordStore
) -> None:
    (moving, staying, *_), _ = by_shard(cluster, 0)
    store.write(staying)
    slot = int(cluster.nodes[0].execute("CLUSTER", "KEYSLOT", f"{{{moving.ref.key.hex()}}}"))
    target = bytes(cluster.nodes[1].execute("CLUSTER", "MYID")).decode()
    cluster.nodes[0].execute("CLUSTER", "SETSLOT", slot, "MIGRATING", target)
    try:
        with pytest.raises(RecordMissing):
            reads_back(store, moving)
        with pytest.raises(StoreTransient):
            store.write(moving)
        assert store.exists([moving.ref, staying.ref]) == [False, True]
        assert reads_back(store, staying)
    finally:
        cluster.nodes[0].execute("CLUSTER", "SETSLOT", slot, "STABLE")
    store.write(moving)
    assert reads_back(store, moving)


def test_never_more_connections_than_allowed_to_all_shards_together(cluster: ValkeyCluster) -> None:
    def clients() -> int:
        return sum(len(bytes(node.execute("CLIENT", "LIST")).splitlines()) for node in cluster.nodes)

    before, limit = clients(), 4
    settings = replace(cluster_settings(cluster.address, 10.0), connection_pool_size=limit)
    store = redis_store(settings, codec_for("none"))
    store.open()
    try:
        parts = [make_part(number, 300_000) for number in range(48)]
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(store.write, parts))
            assert all(pool.map(lambda part: reads_back(store, part), parts))
        assert 1 < store.stats()["connections_open"] <= limit
        assert wait_until(
            lambda: clients() - before <= limit
        )  # a server hears of a closed one a little later
    finally:
        store.close()


def move_slot(cluster: ValkeyCluster, slot: int, source: int, target: int) -> None:
    """With its values, as an operator's tool does."""
    old, new = cluster.nodes[source], cluster.nodes[target]
    old_id, new_id = (bytes(node.execute("CLUSTER", "MYID")).decode() for node in (old, new))
    new.execute("CLUSTER", "SETSLOT", slot, "IMPORTING", old_id)
    old.execute("CLUSTER", "SETSLOT", slot, "MIGRATING", new_id)
    names = old.execute("CLUSTER", "GETKEYSINSLOT", slot, 1000)
    assert names
    old.execute("MIGRATE", "127.0.0.1", new.port, "", 0, 10_000, "AUTH", PASSWORD, "KEYS", *names)
    for node in (new, old, *cluster.nodes):
        node.execute("CLUSTER", "SETSLOT", slot, "NODE", new_id)
