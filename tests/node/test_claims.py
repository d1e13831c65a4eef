"""One process can't take all the memory there is to write to, however long it lives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtiers.model.reasons import Refusal
from kvtiers.node.claims import SHARE, Claims
from kvtiers.node.handles import Store
from kvtiers.testing.chaos import wait_until

if TYPE_CHECKING:
    from tests.node.conftest import LocalNode, MakeChild, MakeEngine

    from kvtiers.testing.direct_engine import DirectEngine


def claimed(local: LocalNode, pid: int | None = None) -> int:
    """Bytes that the clients' processes have open."""
    return max(
        (one["process_storing_bytes"] for one in local.server.clients if pid in (None, one["pid"])), default=0
    )


def hoard(engine: DirectEngine, first: int = 100) -> list[Store]:
    """Open stores of four chunks until one is refused."""
    stores = []
    for document in range(first, first + 100):
        stores.append(engine.open_store(engine.tokens(document, 4)))
        if stores[-1].refused:
            break
    return stores


def test_a_small_arena_has_room_for_one_chunk() -> None:
    claims = Claims(100)
    assert claims.room(40) == 50
    assert claims.room(80) == 80
    claims.nbytes = 80
    assert claims.room(10) == 0


def test_what_a_process_may_have_open_is_bounded_and_others_store_meanwhile(
    local: LocalNode, make_child: MakeChild, make_engine: MakeEngine
) -> None:
    child = make_child(local.socket, "hoard")
    [given] = child.hear("holding")
    capacity = local.node.plan.core.cpu.capacity
    held = claimed(local, child.process.pid)
    assert held == int(given) * (held // int(given)) <= SHARE * capacity < held + held // int(given)
    engine = make_engine(local.socket).connect()
    assert engine.store(engine.tokens(1, 8)).indices == tuple(range(8))
    assert engine.load(engine.tokens(1, 8)).num_chunks == 8
    child.kill()
    assert wait_until(lambda: claimed(local) == 0)


def test_room_comes_back_with_every_way_to_end_a_store(local: LocalNode, make_engine: MakeEngine) -> None:
    engine, other = make_engine(local.socket).connect(), make_engine(local.socket).connect()
    stores = hoard(engine)
    assert stores[-1].refused[0][2] is Refusal.NO_SLOT
    full = claimed(local)
    assert other.open_store(other.tokens(1, 1)).refused == [(0, 1, Refusal.NO_SLOT)], "it is of that process"
    chunk = full // sum(len(store.indices) for store in stores)
    engine.write(stores[0], engine.tokens(100, 4))
    engine.client.commit(stores[0], [0])
    engine.until(lambda: stores[0].committed == 1)
    assert claimed(local) == full - chunk
    engine.client.commit(stores[0])
    engine.until(lambda: stores[0].committed == 4)
    assert claimed(local) == full - 4 * chunk
    engine.client.abort(stores[1])
    engine.client.step()
    assert wait_until(lambda: claimed(local) == full - 8 * chunk)
    engine.client.close()
    assert wait_until(lambda: claimed(local) == 0)
    assert other.store(other.tokens(1, 1)).indices == (0,)


def test_it_stays_claimed_while_a_lost_connection_may_still_be_written_by(
    local: LocalNode, make_engine: MakeEngine
) -> None:
    engine, other = make_engine(local.socket).connect(), make_engine(local.socket).connect()
    [store] = [engine.open_store(engine.tokens(1, 4))]
    held = claimed(local)
    assert held
    engine.client._lose("a test")
    assert wait_until(lambda: local.server.counters["lost"] == 1)
    assert claimed(local) == held
    engine.connect()
    engine.client.abort(store)
    engine.until(lambda: claimed(local) == 0)
    assert [one["oldest_s"] for one in local.server.clients] == [0.0, 0.0]
    waiting = other.open_store(other.tokens(2, 1))
    assert wait_until(lambda: max(one["oldest_s"] for one in local.server.clients) > 0.01)
    other.client.abort(waiting)
    other.client.step()
    assert local.comes_to_rest()
