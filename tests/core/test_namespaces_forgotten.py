"""A namespace costs nothing once nobody uses it and nothing of it is left. Every step is checked by the oracle."""

from __future__ import annotations

import pytest

from kvtiers.core.messages import MappersGone
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Parts
from kvtiers.model.tiers import Tier
from kvtiers.testing.small_core import NAMESPACE, SmallCore, keys_of, memory_of, store_of

OTHER = b"o" * 32


def parts(core: SmallCore) -> Parts:
    return core.specs[0].parts


def known(core: SmallCore) -> set[bytes]:
    assert core.driver.core.check_integrity() == []
    return set(core.driver.core.namespaces())


def test_it_is_forgotten_with_its_last_session() -> None:
    core = SmallCore(memory_of(4))
    inner, one, two = core.driver.core, core.open_session(), core.open_session()
    space = inner.attach(OTHER, parts(core), 16, one)
    assert inner.attach(OTHER, parts(core), 16, two) == space
    assert inner.attach(OTHER, parts(core), 16, two) == space  # once more is no more
    inner.detach(one, space)
    assert known(core) == {NAMESPACE, OTHER}
    inner.tell(MappersGone(two), 0.0)
    assert known(core) == {NAMESPACE}
    with pytest.raises(InvariantBroken):
        inner.lookup(space, keys_of("a"))


def test_chunks_keep_it_known_and_it_goes_with_the_last_of_them() -> None:
    core = SmallCore(memory_of(4), disk=store_of(100), ghosts=0)
    driver, session = core.driver, core.session
    space = driver.attach(OTHER, parts(core), 16, session)
    root, keys = ChunkKey(OTHER), keys_of("ab")
    ticket = driver.call(lambda inner, now: inner.open_store(session, space, root, keys, now))
    driver.call(lambda inner, now: inner.commit(ticket, now))
    driver.call(lambda inner, _: inner.detach(session, space))
    driver.run()
    assert known(core) == {NAMESPACE, OTHER}
    assert driver.attach(OTHER, parts(core), 16, session) == space
    assert driver.core.lookup(space, keys).tiers == (Tier.CPU, Tier.CPU)
    driver.call(lambda inner, _: inner.detach(session, space))
    for tier in (Tier.CPU, Tier.DISK):
        driver.call(lambda inner, now, tier=tier: inner.evict(tier, 0, now))  # type: ignore[misc]
        driver.run()
    assert known(core) == {NAMESPACE}


def test_a_number_is_never_given_twice() -> None:
    core = SmallCore(memory_of(4))
    inner = core.driver.core
    numbers = []
    for _ in range(3):
        numbers.append(inner.attach(OTHER, parts(core), 16, core.session))
        inner.detach(core.session, numbers[-1])
    assert len({*numbers, *core.spaces}) == 4
