"""One rank's part of a chunk is damaged while the service is away: the hit ends there, and the next store heals it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtiers.model.keys import ChunkKey
from kvtiers.model.tiers import Tier
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.disk_damage import damage_file, record_files
from kvtiers.testing.paged_blocks import CHUNK_BLOCKS, CHUNK_TOKENS, PagedRequest
from kvtiers.testing.paged_engine import PagedEngine
from kvtiers.testing.sealed_parts import Damage
from kvtiers.testing.service_process import PATIENCE_S, ServiceProcess

pytestmark = pytest.mark.slow

CHUNKS = 4
DAMAGED = 2


@pytest.fixture
def service(folder: Path) -> Iterator[ServiceProcess]:
    one = ServiceProcess(folder)
    one.start()
    yield one
    one.kill()


@pytest.fixture
def engine(service: ServiceProcess) -> Iterator[PagedEngine]:
    one = PagedEngine(service.socket).connect()
    yield one
    one.close()


def run(engine: PagedEngine, name: str) -> PagedRequest:
    """The prompt, by an engine that has nothing of it itself."""
    assert engine.pool.reset()
    request = engine.add(PagedRequest(name, list(range(CHUNKS * CHUNK_TOKENS + 1)), 1))
    engine.drain()
    return request


def loaded(engine: PagedEngine, name: str) -> int:
    """Chunks that the prompt got from the cache."""
    before = engine.loaded_tokens
    run(engine, name)
    return (engine.loaded_tokens - before) // CHUNK_TOKENS


def come_back(service: ServiceProcess, engine: PagedEngine) -> None:
    """Start it again, and step until every side has heard of that."""
    clients = [engine.client, *(rank.link.client for rank in engine.ranks)]
    before = [client.counters["connects"] for client in clients]
    service.start()

    def connected() -> bool:
        engine.step()
        again = [client.counters["connects"] for client in clients]
        return engine.side.ready and all(now > then for now, then in zip(again, before, strict=True))

    assert wait_until(connected, PATIENCE_S, every=0.001)


@pytest.mark.parametrize("rank", [0, 1])
def test_damage_to_the_part_of_one_rank_ends_the_hit_and_is_healed_by_the_next_store(
    engine: PagedEngine, service: ServiceProcess, rank: int
) -> None:
    request = run(engine, "cold")
    stored = engine.side.stores.counters
    assert stored["stored"] == CHUNKS
    assert service.terminate() == 0
    key = ChunkKey(request.block_hashes[(DAMAGED + 1) * CHUNK_BLOCKS - 1])
    parts = {(ref.key, ref.part): file for ref, file in record_files(service.disk).items()}
    damage_file(parts[key, rank], Damage.FLIP_PAYLOAD)
    come_back(service, engine)
    assert loaded(engine, "damaged") == DAMAGED
    assert service.stats()["misses"] == {"corrupt": 1}
    assert (stored["stored"], stored["refused"], stored["failed"]) == (
        CHUNKS + 1,
        1,
        0,
    )  # the last one is sound
    assert loaded(engine, "mended") == CHUNKS
    assert service.terminate() == 0
    come_back(service, engine)
    assert loaded(engine, "from disk") == CHUNKS
    assert engine.side.counts.by_tier[Tier.DISK] >= CHUNKS * CHUNK_TOKENS
