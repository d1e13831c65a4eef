"""Registered buffers of the Mooncake store: as many as calls may be under way, bounded in bytes, and waiting for one is counted. No engine."""

from __future__ import annotations

import threading
import time

import pytest

from kvtiers.model.errors import ConfigError, StoreTransient
from kvtiers.stores.connections import Connections
from kvtiers.stores.mooncake.registered import Blocks
from kvtiers.stores.mooncake.settings import MooncakeSettings

MIB = 1 << 20


@pytest.mark.parametrize(
    ("connections", "piece_bytes", "bounce_bytes", "buffers"),
    [(8, 32 * MIB, 512 * MIB, 8), (32, 32 * MIB, 512 * MIB, 16), (32, MIB, 512 * MIB, 32), (4, MIB, MIB, 1)],
)
def test_a_buffer_for_each_call_as_far_as_the_bytes_go(
    connections: int, piece_bytes: int, bounce_bytes: int, buffers: int
) -> None:
    settings = MooncakeSettings(
        "master:1", connection_pool_size=connections, piece_bytes=piece_bytes, bounce_bytes=bounce_bytes
    )
    assert settings.bounce_buffers == buffers


def test_buffers_that_would_hold_no_piece_are_refused() -> None:
    with pytest.raises(ConfigError, match="bounce_bytes"):
        MooncakeSettings("master:1", bounce_bytes=MIB)


def test_a_wait_for_a_buffer_counts_as_one_for_a_connection() -> None:
    connections = Connections(4, timeout_s=20.0)
    blocks = Blocks(1, 65_536, 20.0, connections.waits)
    with blocks.take() as first:
        assert connections.stats()["connection_waits"] == 0
        taken = threading.Event()

        def take() -> None:
            with blocks.take() as second:
                assert second.address == first.address
                taken.set()

        other = threading.Thread(target=take)
        other.start()
        assert not taken.wait(0.05)
    assert taken.wait(20)
    other.join(20)
    stats = connections.stats()
    assert stats["connection_waits"] == 1
    assert stats["connection_wait_us"] >= 40_000


def test_nobody_waits_for_a_buffer_beyond_the_calls_own_time() -> None:
    connections = Connections(4, timeout_s=60.0)
    blocks = Blocks(1, 65_536, 60.0, connections.waits)
    began = time.monotonic()
    with blocks.take(), pytest.raises(StoreTransient), blocks.take(began + 0.05):
        pass
    assert time.monotonic() - began < 30
    assert connections.stats()["connection_waits"] == 1
