"""Two node services, each with an arena and a disk of its own, share KV through one Valkey, which dies and stops under their hands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.direct_engine import DirectEngine
from kvtiers.testing.servers.relay import Relay
from kvtiers.testing.servers.valkey import ValkeyServer
from kvtiers.testing.service_process import ServiceProcess
from kvtiers.testing.toy_engine import ToyEngine

CHUNKS = 6
HEALS_WITHIN_S = 90.0
TROUBLE = frozenset({MissReason.TIER_OPEN, MissReason.STAGING_TIMEOUT})
DOWN, UP = "the remote tier is out of order", "the remote tier works again"


class Site(NamedTuple):
    """One Valkey, and two services; the second reaches it through a relay."""

    valkey: ValkeyServer
    relay: Relay
    first: ServiceProcess
    second: ServiceProcess

    def heal(self) -> None:
        """Everything runs, and both services have noticed."""
        self.relay.limit(None)
        self.valkey.resume()
        self.valkey.start()
        for service in (self.first, self.second):
            assert wait_until(lambda service=service: remote(service)["up"], HEALS_WITHIN_S)  # type: ignore[misc]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with TemporaryDirectory(prefix="kvt-") as name:
        folder = Path(name)  # short enough for sockets
        valkey = ValkeyServer(folder / "v")
        valkey.start()
        with Relay(valkey.address) as relay:
            services = [
                make_service(folder / "1", valkey.address),
                make_service(folder / "2", relay.address),
            ]
            try:
                for service in services:
                    service.start(wait=False)
                for service in services:
                    service.wait_ready()
                yield Site(valkey, relay, *services)
            finally:
                for service in services:
                    service.kill()
                valkey.stop()


def make_service(folder: Path, address: tuple[str, int]) -> ServiceProcess:
    folder.mkdir()
    remote = {
        "enabled": True,
        "backend": "redis",
        "endpoint": f"redis://{address[0]}:{address[1]}",
        "timeout_ms": 1000,
        "absent_for_s": 0.05,
    }
    return ServiceProcess(folder, {"storage.remote": remote})


MakeEngine = Callable[..., DirectEngine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    made: list[DirectEngine] = []

    def make(service: ServiceProcess, **options: Any) -> DirectEngine:
        made.append(DirectEngine(service.socket, **options).connect())
        return made[-1]

    yield make
    for engine in made:
        engine.client.close()


def remote(service: ServiceProcess) -> dict[str, Any]:
    found: dict[str, Any] = service.stats()["tiers"]["remote"]
    return found


def uploaded(site: Site, engine: DirectEngine, tokens: list[int]) -> None:
    """Wait until Valkey has every part of the prompt's chunks."""
    names = [
        f"kv1:{engine.oracle.digest.hex()}:{{{key.hex()}}}:{part}"
        for key in engine.oracle.keys(tokens)
        for part in range(len(engine.space.parts))
    ]
    assert wait_until(lambda: site.valkey.execute("EXISTS", *names) == len(names))


def told(service: ServiceProcess, since: int) -> list[str]:
    """Lines of its log from that place on, without date and name; not those about clients that come and go."""
    lines = [line for line in service.log[since:].splitlines() if "kvtiers.node.server" not in line]
    return [line.partition(": ")[2] for line in lines]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_one_service_has_stored_another_loads(site: Site, make_engine: MakeEngine, ranks: int) -> None:
    one, other = (make_engine(service, ranks=ranks) for service in (site.first, site.second))
    tokens = one.tokens(ranks, CHUNKS)
    one.store(tokens)
    uploaded(site, one, tokens)
    before = remote(site.second)["hits"]
    longer = other.tokens(ranks, CHUNKS + 2)
    load = other.load(longer)  # every byte is compared
    assert (load.tiers, load.stopped_by) == ((Tier.REMOTE,) * CHUNKS, MissReason.NEVER_SEEN)
    assert other.load(tokens).tiers == (Tier.CPU,) * CHUNKS
    assert remote(site.second)["hits"] == before + CHUNKS


def test_toy_engines_on_two_services_share_a_prefix(site: Site) -> None:
    engines = [ToyEngine(service.socket, "a-toy") for service in (site.first, site.second)]
    try:
        one, other = engines
        prompt = one.tokens(1, 8)
        assert wait_until(lambda: one.run(prompt).loaded == 8)
        assert wait_until(lambda: other.run(prompt).loaded == 8)
        assert wait_until(lambda: remote(site.second)["hits"] > 0)
    finally:
        for engine in engines:
            engine.close()


def seen_as_misses(engine: DirectEngine, document: int) -> None:
    """Until the service knows that its store is down: requests end by their deadline, and say why."""

    def is_known() -> bool:
        nonlocal document
        document += 1
        load = engine.load(engine.tokens(document, CHUNKS), timeout=0.5)
        assert load.num_chunks == 0
        assert load.stopped_by in TROUBLE
        return not engine.stats()["tiers"]["remote"]["up"]

    assert wait_until(is_known)
    assert engine.load(engine.tokens(document, CHUNKS)).stopped_by is MissReason.TIER_OPEN


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_server_lost_in_mid_store_costs_no_request_and_is_used_again_when_it_is_back(
    site: Site, make_engine: MakeEngine, how: str
) -> None:
    site.heal()
    base = {"kill": 1000, "pause": 2000}[how]
    one, other = (make_engine(service, model=f"store-{how}") for service in (site.first, site.second))
    since = [len(service.log) for service in (site.first, site.second)]
    site.valkey.pause()
    for document in range(base, base + 5):  # the engine does not wait for Valkey
        one.store(one.tokens(document, CHUNKS))
    assert wait_until(lambda: remote(site.first)["writes_in_flight"] > 0)
    if how == "kill":
        site.valkey.kill()
    for engine in (one, other):
        seen_as_misses(engine, base + 100)
    for document in range(base, base + 5):
        assert one.load(one.tokens(document, CHUNKS)).num_chunks == CHUNKS
    site.heal()
    fresh = one.tokens(base + 50, CHUNKS)
    one.store(fresh)
    uploaded(site, one, fresh)
    assert other.load(fresh).tiers == (Tier.REMOTE,) * CHUNKS
    for document in range(base, base + 5):
        other.load(other.tokens(document, CHUNKS))  # whatever has arrived of it is right
    for service, start in zip((site.first, site.second), since, strict=True):
        check_log(service, start)


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_server_lost_in_mid_load_costs_no_request_and_is_used_again_when_it_is_back(
    site: Site, make_engine: MakeEngine, how: str
) -> None:
    site.heal()
    one, other = (make_engine(service, model=f"load-{how}") for service in (site.first, site.second))
    tokens = one.tokens(1, 2 * CHUNKS)
    one.store(tokens)
    uploaded(site, one, tokens)
    since = len(site.second.log)
    site.relay.limit(40_000)  # what is asked for has passed long before what is answered
    load = other.client.stage(other.space, other.oracle.keys(tokens), deadline=time.monotonic() + 10)
    other.until(lambda: reads_wait(site.second) or load.done)
    getattr(site.valkey, how)()
    other.until(lambda: load.done)
    other.check(load, tokens)
    assert load.num_chunks < 2 * CHUNKS
    assert load.stopped_by in TROUBLE
    other.client.release(load)
    seen_as_misses(other, 100)
    site.heal()
    fresh = one.tokens(2, CHUNKS)
    one.store(fresh)
    uploaded(site, one, fresh)
    assert other.load(fresh).tiers == (Tier.REMOTE,) * CHUNKS
    check_log(site.second, since)


def reads_wait(service: ServiceProcess) -> bool:
    stats = service.stats()
    reading: int = stats["async"]["pools"]["remote"]["busy"]
    return reading > 0 and stats["tiers"]["remote"]["entries"] > 0


def check_log(service: ServiceProcess, since: int) -> None:
    """It has told of the outage, and of its end: not of each chunk."""
    lines = told(service, since)
    outages = [line for line in lines if line.startswith((DOWN, UP))]
    assert len(outages) >= 2
    assert [line.startswith(DOWN) for line in outages] == [number % 2 == 0 for number in range(len(outages))]
    assert len(lines) - len(outages) <= CHUNKS, lines
