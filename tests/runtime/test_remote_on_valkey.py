"""The whole cache on a real Valkey that fills up, crawls, turns us away, loses a shard, or holds a flipped bit: misses, and one line of log."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme

from kvtiers.model.errors import CacheClosed
from kvtiers.model.keys import ChunkKey
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.testing.cache_oracle import SMALL_CHUNK, SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import namespace, small_config, wait_until
from kvtiers.testing.servers.process import LOOPBACK
from kvtiers.testing.servers.relay import Relay
from kvtiers.testing.servers.valkey import ValkeyCluster, ValkeyServer

CHUNKS = 6
TIMEOUT_MS = 1500
CLOSE_S = 30.0
PASSWORD = "open sesame"
TROUBLE = frozenset({MissReason.TIER_OPEN, MissReason.STAGING_TIMEOUT})


class Instances:
    """Caches without a disk, which log to `caplog`."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog
        self.made: list[TieredCache] = []

    def make(self, endpoint: str, values: Mapping[str, Any] | None = None) -> TieredCache:
        remote = {
            "enabled": True,
            "backend": "redis",
            "endpoint": endpoint,
            "timeout_ms": TIMEOUT_MS,
            "absent_for_s": 0.05,
            "compression": "none",
        }
        config = small_config(None, {"remote": remote, **(values or {})})
        self.made.append(TieredCache(config, SMALL_LAYOUT, namespace()))
        return self.made[-1]

    def told(self) -> list[str]:
        """Lines of log since the start of the test, warnings and worse."""
        return [record.getMessage() for record in self.caplog.records if record.levelno >= logging.WARNING]

    def close(self) -> None:
        """All of them, in time."""
        closed = [cache.close(CLOSE_S) for cache in self.made]
        self.made.clear()
        assert all(closed)


@pytest.fixture
def instances(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Instances]:
    monkeypatch.setenv("KVTIERS_REMOTE_PASSWORD", PASSWORD)
    caplog.set_level(logging.INFO, "kvtiers")
    found = Instances(caplog)
    yield found
    problems = [problem for cache in found.made for problem in cache.check_integrity()]
    found.close()
    assert problems == []


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer(
        tmp_path_factory.mktemp("kvt") / "v", password=PASSWORD, options={"maxmemory-policy": "noeviction"}
    )
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(started: ValkeyServer) -> ValkeyServer:
    started.clear()
    return started


@pytest.fixture
def relay(server: ValkeyServer) -> Iterator[Relay]:
    with Relay(server.address) as relay:
        yield relay


def at(address: tuple[str, int], scheme: str = "redis") -> str:
    return f"{scheme}://{address[0]}:{address[1]}"


def tokens(document: int, chunks: int = CHUNKS) -> list[int]:
    return list(range(document * 100_000, document * 100_000 + chunks * SMALL_CHUNK))


def stored(cache: TieredCache, oracle: CacheOracle, *documents: int) -> None:
    for document in documents:
        cache.store(tokens(document), oracle.kv(tokens(document)))
    cache.flush(20)


def loaded(
    cache: TieredCache, oracle: CacheOracle, document: int
) -> tuple[tuple[Tier, ...], MissReason | None]:
    """Where its chunks came from, every byte checked, and why it is not more."""
    found = cache.load(tokens(document)).result(timeout=60)
    oracle.check(tokens(document), found.num_tokens, found.kv)
    return found.tiers, found.stopped_by


def all_from(tier: Tier, chunks: int = CHUNKS) -> tuple[tuple[Tier, ...], MissReason | None]:
    return (tier,) * chunks, None


def remote(cache: TieredCache) -> dict[str, Any]:
    found: dict[str, Any] = cache.stats()["tiers"]["remote"]
    return found


def goes_down(cache: TieredCache, oracle: CacheOracle) -> None:
    """Ask for what nobody has until the tier is known to be down: each request is a miss that says why."""
    document = 1000
    while remote(cache)["up"]:
        tiers, reason = loaded(cache, oracle, document)
        assert (tiers, reason in TROUBLE) == ((), True), reason
        document += 1
        assert document < 1400
    assert loaded(cache, oracle, document) == ((), MissReason.TIER_OPEN)
    assert cache.lookup(tokens(document)).stopped_by is MissReason.TIER_OPEN


# --- turned away ------------------------------------------------------------------------------------------------------


class Wrong:
    """Ways to get the access wrong, and what has to be said about it."""

    def __init__(self, server: ValkeyServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = server
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.relays: list[Relay] = []

    def password(self) -> tuple[str, dict[str, Any], str]:
        self.monkeypatch.setenv("KVTIERS_REMOTE_PASSWORD", "not the word")
        return at(self.server.address), {}, "KVTIERS_REMOTE_PASSWORD"

    def certificate(self) -> tuple[str, dict[str, Any], str]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert(LOOPBACK).configure_cert(context)
        self.relays.append(Relay(self.server.address, tls=context))
        trusted = self.folder / "ca.pem"
        trustme.CA().cert_pem.write_to_path(str(trusted))
        return at(self.relays[0].address, "rediss"), {"remote.redis.tls_ca_file": str(trusted)}, "tls_ca_file"

    def host(self) -> tuple[str, dict[str, Any], str]:
        return "kvtiers-no-such-host.invalid:6379", {}, "the host of kvtiers-no-such-host.invalid:6379"

    def port(self) -> tuple[str, dict[str, Any], str]:
        with Relay(self.server.address) as closed:
            address = closed.address
        return at(address), {}, "Connection refused"


@pytest.fixture
def wrong(server: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wrong]:
    found = Wrong(server, tmp_path, monkeypatch)
    yield found
    for relay in found.relays:
        relay.close()


@pytest.mark.parametrize("what", ["password", "certificate", "host", "port"])
def test_a_cache_that_is_turned_away_says_once_why_and_runs_on(
    instances: Instances, oracle: CacheOracle, wrong: Wrong, what: str
) -> None:
    endpoint, values, hint = getattr(wrong, what)()
    cache = instances.make(endpoint, values)
    assert wait_until(lambda: len(instances.told()) == 1)  # nobody has used it yet
    for document in range(8):
        cache.store(tokens(document), oracle.kv(tokens(document)))
        assert loaded(cache, oracle, document) == all_from(Tier.CPU)
    goes_down(cache, oracle)
    (line,) = instances.told()
    assert "the remote tier is out of order" in line
    assert hint in line
    assert "not the word" not in instances.caplog.text
    lines = [record for record in instances.caplog.records if record.name.startswith("kvtiers")]
    assert len(lines) < CHUNKS  # of all levels: not one a chunk
    instances.close()


def test_a_password_that_is_set_right_on_the_server_lets_the_cache_in_without_a_restart(
    instances: Instances, oracle: CacheOracle, server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.execute("ACL", "SETUSER", "late", "on", ">another word", "~*", "+@all")
    monkeypatch.setenv("KVTIERS_REMOTE_USERNAME", "late")
    cache = instances.make(at(server.address))
    cache.store(tokens(1), oracle.kv(tokens(1)))
    goes_down(cache, oracle)
    server.execute("ACL", "SETUSER", "late", f">{PASSWORD}")
    assert wait_until(lambda: remote(cache)["up"], 60)
    stored(cache, oracle, 2)
    assert loaded(instances.make(at(server.address)), oracle, 2) == all_from(Tier.REMOTE)


# --- full, slow -------------------------------------------------------------------------------------------------------


def test_a_full_server_takes_no_more_loses_nothing_and_is_written_to_again_when_it_has_room(
    instances: Instances, oracle: CacheOracle, server: ValkeyServer
) -> None:
    cache, other = instances.make(at(server.address)), instances.make(at(server.address))
    stored(cache, oracle, 1)
    server.execute("CONFIG", "SET", "maxmemory", 1)
    try:
        for document in range(2, 6):
            cache.store(tokens(document), oracle.kv(tokens(document)))
        assert wait_until(lambda: remote(cache)["failed"] > 0)
        assert [loaded(cache, oracle, document) for document in range(1, 6)] == [all_from(Tier.CPU)] * 5
        assert loaded(other, oracle, 1) == all_from(Tier.REMOTE)  # it is not ours to throw out
        assert loaded(other, oracle, 2) == ((), MissReason.NEVER_SEEN)
        assert remote(cache)["up"]
        lines = [line for line in instances.told() if "full" in line or "no more" in line]
        assert (len(lines), instances.told()) == (1, lines)
    finally:
        server.execute("CONFIG", "SET", "maxmemory", 0)
    assert wait_until(lambda: remote(cache)["stored"] == 5 * CHUNKS, 60)
    assert loaded(other, oracle, 5) == all_from(Tier.REMOTE)


def test_a_server_slower_than_the_deadline_is_a_miss_and_used_again_when_it_is_faster(
    instances: Instances, oracle: CacheOracle, server: ValkeyServer, relay: Relay
) -> None:
    stored(instances.make(at(server.address)), oracle, 1, 2)
    cache = instances.make(at(relay.address))
    assert loaded(cache, oracle, 1) == all_from(Tier.REMOTE)
    relay.limit(1000)
    tiers, reason = loaded(cache, oracle, 2)
    assert tiers != (Tier.REMOTE,) * CHUNKS
    assert reason in TROUBLE
    goes_down(cache, oracle)
    assert loaded(cache, oracle, 1) == all_from(Tier.CPU)
    assert [line.partition(":")[0] for line in instances.told()] == ["the remote tier is out of order"]
    relay.limit(None)
    assert wait_until(lambda: remote(cache)["up"], 60)
    tiers, reason = loaded(cache, oracle, 2)
    assert (len(tiers), reason) == (CHUNKS, None)


def test_a_cache_whose_server_hangs_closes_in_time(
    instances: Instances, oracle: CacheOracle, relay: Relay
) -> None:
    cache = instances.make(at(relay.address))
    stored(cache, oracle, 1)
    relay.limit(0)
    cache.store(tokens(2), oracle.kv(tokens(2)))
    pending = cache.load(tokens(3))
    instances.close()
    with pytest.raises(CacheClosed):
        pending.result(timeout=30)


# --- a flipped bit, two at once -----------------------------------------------------------------------------------------


def piece_of(server: ValkeyServer, key: ChunkKey) -> bytes:
    """The name of a chunk's one piece."""
    names: list[bytes] = server.execute("KEYS", f"*:{{{key.hex()}}}:*")
    return max(names, key=len)


def test_a_flipped_bit_in_the_server_is_a_miss_counted_and_healed_by_the_next_store(
    instances: Instances, oracle: CacheOracle, server: ValkeyServer
) -> None:
    stored(instances.make(at(server.address)), oracle, 1)
    piece = piece_of(server, oracle.keys(tokens(1))[2])
    value = bytearray(server.execute("GET", piece))
    value[len(value) // 2] ^= 1
    server.execute("SET", piece, bytes(value))
    cache = instances.make(at(server.address))
    assert loaded(cache, oracle, 1) == ((Tier.REMOTE,) * 2, MissReason.CORRUPT)
    assert remote(cache)["corrupt"] == 1
    assert remote(cache)["store"]["corrupt"] == 1
    stored(cache, oracle, 1)
    assert loaded(instances.make(at(server.address)), oracle, 1) == all_from(Tier.REMOTE)


def test_instances_that_upload_the_same_chunks_at_one_time_do_no_harm(
    instances: Instances, oracle: CacheOracle, server: ValkeyServer
) -> None:
    caches = [instances.make(at(server.address)) for _ in range(3)]
    barrier = threading.Barrier(len(caches))

    def store(cache: TieredCache) -> None:
        for document in range(8):
            kv = oracle.kv(tokens(document))
            barrier.wait(30)
            cache.store(tokens(document), kv)
        cache.flush(20)

    threads = [threading.Thread(target=store, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    reader = instances.make(at(server.address))
    assert [loaded(reader, oracle, document) for document in range(8)] == [all_from(Tier.REMOTE)] * 8
    assert server.execute("DBSIZE") == 2 * CHUNKS * 8  # a piece and a manifest each: nothing is left over
    assert sum(remote(cache)["stored"] + remote(cache)["present"] for cache in caches) == 3 * CHUNKS * 8


# --- a cluster --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    cluster = ValkeyCluster(tmp_path_factory.mktemp("kvt") / "c", password=PASSWORD)
    cluster.start()
    yield cluster
    cluster.stop()


def test_a_cluster_that_loses_a_shard_goes_on_with_the_chunks_of_the_others(
    instances: Instances, oracle: CacheOracle, cluster: ValkeyCluster
) -> None:
    endpoint = at(cluster.address, "redis-cluster")
    first = instances.make(endpoint, {"remote.known_for_s": 2.0})
    lost = cluster.nodes[2]
    single = {document: tokens(document, 1) for document in range(24)}
    for mine in single.values():
        first.store(mine, oracle.kv(mine))
    first.flush(20)
    there = {
        document: cluster.node_of(f"{{{oracle.keys(mine)[0].hex()}}}") is not lost
        for document, mine in single.items()
    }
    assert 0 < sum(there.values()) < len(there)
    second = instances.make(endpoint)
    lost.kill()

    def hits(cache: TieredCache) -> dict[int, bool]:
        found = {}
        for document, mine in single.items():
            answer = cache.load(mine).result(timeout=60)
            oracle.check(mine, answer.num_tokens, answer.kv)
            found[document] = answer.num_tokens > 0
        return found

    assert wait_until(lambda: hits(second) == there, 60)
    assert remote(second)["up"]
    before = remote(first)["stored"]
    for document in range(100, 124):
        first.store(tokens(document, 1), oracle.kv(tokens(document, 1)))
    assert wait_until(lambda: remote(first)["stored"] > before)  # whole chunks go to the shards that are left
    assert remote(first)["up"]
    assert instances.told() == []
    cluster.start()
    second.evict("cpu")

    def stored_again() -> bool:
        for mine in single.values():
            first.store(mine, oracle.kv(mine))
        return all(hits(second).values())

    assert wait_until(stored_again, 60, every=0.2)


def test_what_a_server_had_before_it_was_restarted_is_not_believed_any_more(
    instances: Instances, server: ValkeyServer, oracle: CacheOracle
) -> None:
    stored(instances.make(at(server.address)), oracle, 1, 2)
    reader = instances.make(at(server.address), {"remote.known_for_s": 3600.0})
    for document in (1, 2):
        assert loaded(reader, oracle, document) == all_from(Tier.REMOTE)
    reader.evict("cpu")
    assert reader.lookup(tokens(2)).num_tokens == len(tokens(2))
    server.kill()
    server.start()
    assert loaded(reader, oracle, 3)[0] == ()  # whatever is asked next is told by the new connection
    assert wait_until(lambda: reader.lookup(tokens(1)).num_tokens == reader.lookup(tokens(2)).num_tokens == 0)
    stored(instances.made[0], oracle, 3)
    assert wait_until(lambda: loaded(reader, oracle, 3) == all_from(Tier.REMOTE))
