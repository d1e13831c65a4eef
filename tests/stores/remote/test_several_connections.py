"""A batch takes the connections that are free, and never waits for more than one."""

from __future__ import annotations

import pytest

from kvtiers.model.errors import StoreTransient
from kvtiers.stores.connections import Connections


def test_a_batch_takes_what_is_free_and_gives_it_back() -> None:
    connections = Connections(4, timeout_s=0.01)
    with connections.use(), connections.use_several(8) as held:
        assert held == 3
        with pytest.raises(StoreTransient), connections.use():
            pass
    with connections.use_several(2) as held:
        assert held == 2
        with connections.use_several(8) as rest:
            assert rest == 2
    with connections.use_several(8) as held:
        assert held == 4


def test_a_batch_that_finds_none_free_fails_and_keeps_none() -> None:
    connections = Connections(1, timeout_s=0.01)
    with connections.use(), pytest.raises(StoreTransient), connections.use_several(8):
        pass
    with connections.use_several(8) as held:
        assert held == 1
