"""Two vLLM engines on two node services share a prefix through one Valkey: tokens, counts, blocks and bytes are all compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvtiers.model.tiers import Tier
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.servers.valkey import ValkeyServer
from kvtiers.testing.service_process import ServiceProcess

if TYPE_CHECKING:
    from tests.vllm.conftest import Engine, MakeEngine, Text

pytestmark = pytest.mark.vllm

Expected = Callable[..., tuple[int, ...]]


@pytest.fixture(scope="module")
def valkey(folder: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(folder / "valkey")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def services(
    valkey: ValkeyServer, make_session_service: Callable[..., ServiceProcess]
) -> list[ServiceProcess]:
    host, port = valkey.address
    remote = {
        "enabled": True,
        "backend": "redis",
        "endpoint": f"redis://{host}:{port}",
        "absent_for_s": 0.1,
    }
    return [make_session_service(name, {"storage.remote": remote}) for name in ("v1", "v2")]


@pytest.fixture(scope="module")
def engines(
    services: list[ServiceProcess],
    make_engine: MakeEngine,
    connector: Callable[..., dict[str, Any]],
    smollm2: Path,
) -> Iterator[list[Engine]]:
    made = [make_engine(smollm2, kv_transfer_config=connector(service.socket)) for service in services]
    yield made
    for engine in made:
        engine.stop()


def remote(service: ServiceProcess) -> dict[str, Any]:
    found: dict[str, Any] = service.stats()["tiers"][Tier.REMOTE]
    return found


def test_prompt_of_one_engine_is_a_hit_in_another_on_another_service(
    engines: list[Engine], services: list[ServiceProcess], text: Text, expected: Expected
) -> None:
    prompt = text(40)
    one, other = engines
    cold = one.generate(prompt)[0]
    assert cold.tokens == expected(prompt)
    assert (cold.cached, one.stored(cold)) == (0, list(range(8)))
    assert wait_until(lambda: remote(services[0])["stored"] == 4)  # chunks of two blocks
    hit = other.generate(prompt)[0]
    assert hit.tokens == cold.tokens
    assert hit.cached == 256
    assert other.loaded(hit.name) == list(range(8))
    assert other.stored(hit) == []
    assert remote(services[1])["hits"] == 4


def test_engines_go_on_without_the_server_and_share_again_when_it_is_back(
    engines: list[Engine],
    services: list[ServiceProcess],
    valkey: ValkeyServer,
    text: Text,
    expected: Expected,
) -> None:
    one, other = engines
    lost, later = text(41), text(42)
    valkey.kill()
    assert one.generate(lost)[0].tokens == expected(lost)
    alone = other.generate(lost)[0]
    assert (alone.tokens, alone.cached) == (expected(lost), 0)
    valkey.start()
    for service in services:
        assert wait_until(lambda service=service: remote(service)["up"], 90)  # type: ignore[misc]
    before = remote(services[0])["stored"]
    cold = one.generate(later)[0]
    assert wait_until(lambda: remote(services[0])["stored"] >= before + 4)
    assert wait_until(lambda: remote(services[0])["backlog"] == 0)
    hit = other.generate(later)[0]
    assert hit.tokens == cold.tokens == expected(later)
    assert hit.cached == 256
    assert other.loaded(hit.name) == list(range(8))
