"""An endpoint of Mooncake or InfiniStore may name its backend; what would be no host is refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvtiers.model.errors import ConfigError
from kvtiers.stores.infinistore.values import InfiniStoreSettings
from kvtiers.stores.mooncake.settings import MooncakeSettings

ADDRESSES: dict[str, Callable[[str], tuple[str, int]]] = {
    "mooncake": lambda endpoint: MooncakeSettings(endpoint).master,
    "infinistore": lambda endpoint: InfiniStoreSettings(endpoint).address,
}
DEFAULT_PORTS = {"mooncake": 50051, "infinistore": 22345}


@pytest.mark.parametrize("backend", ADDRESSES)
@pytest.mark.parametrize("written", ["{}", "BACKEND://{}", "BACKEND://{}/"])
def test_the_backend_may_stand_before_the_host(backend: str, written: str) -> None:
    def read(authority: str) -> tuple[str, int]:
        return ADDRESSES[backend](written.replace("BACKEND", backend).format(authority))

    assert read("host.internal:1234") == ("host.internal", 1234)
    assert read("[fe80::1]:1234") == ("fe80::1", 1234)
    assert read("host.internal") == ("host.internal", DEFAULT_PORTS[backend])


@pytest.mark.parametrize("backend", ADDRESSES)
@pytest.mark.parametrize(
    "endpoint",
    [
        "", ":1", "host:", "host:0", "host:65536", "host:port", "http://host:1", "http://host", "host/", "BACKEND://",
        "BACKEND://host:1/path", "BACKEND://BACKEND://host:1",
    ],
)  # fmt: skip
def test_what_is_no_host_and_port_is_refused(backend: str, endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint must be host:port"):
        ADDRESSES[backend](endpoint.replace("BACKEND", backend))
