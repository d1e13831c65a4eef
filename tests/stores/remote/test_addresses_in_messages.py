"""An address of IPv6 stands in brackets in what a store says, so that it is known for one, and left out where anybody may read it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvtiers.http.health import redacted
from kvtiers.model.errors import StoreUnavailable
from kvtiers.records.codecs.none import NoCodec
from kvtiers.stores.base import RecordStore
from kvtiers.stores.infinistore.values import InfiniStoreSettings, infinistore_store
from kvtiers.stores.mooncake.session import Session
from kvtiers.stores.mooncake.settings import MooncakeSettings
from kvtiers.stores.redis import RedisSettings, redis_store
from kvtiers.testing.servers.process import free_port

HOST = "::1"


STORES: dict[str, Callable[[str], RecordStore]] = {
    "redis": lambda endpoint: redis_store(RedisSettings(endpoint), NoCodec()),
    "infinistore": lambda endpoint: infinistore_store(InfiniStoreSettings(endpoint), NoCodec()),
}


@pytest.mark.parametrize("backend", STORES)
def test_a_store_that_cant_be_reached_names_its_address_in_brackets(backend: str) -> None:
    endpoint = f"[{HOST}]:{free_port()}"
    store = STORES[backend](endpoint)
    store.open()
    with pytest.raises(StoreUnavailable) as caught:
        store.probe()
    assert endpoint in str(caught.value)
    assert HOST not in str(redacted(str(caught.value)))
    store.close()


def test_a_mooncake_master_that_cant_be_reached_names_its_address_in_brackets() -> None:
    for endpoint in (f"[{HOST}]:{free_port()}", "[fe80::no:such:host]:1234"):
        with pytest.raises(StoreUnavailable) as caught:
            Session(MooncakeSettings(endpoint))._reach_master()
        assert endpoint in str(caught.value)
        assert "::" not in str(redacted(str(caught.value)))
