"""What follows from a call is done when the call has returned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from kvtiers.core.core import Core
from kvtiers.core.messages import Completion, Intent, Outcome, Probe, ProbeDone, SessionId, SpaceId
from kvtiers.core.remembering import Remember
from kvtiers.core.settings import CoreSettings
from kvtiers.core.tickets import LoadState, LoadTicket
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.parts import Part, Parts
from kvtiers.runtime.shared_core import SharedCore
from kvtiers.testing.small_core import NAMESPACE, keys_of, memory_of, store_of


def test_all_who_wait_for_a_probe_that_is_refused_are_answered_at_once() -> None:
    tickets: list[LoadTicket] = []

    def load() -> None:
        tickets.append(
            shared.run(lambda core, now: core.open_load(session, space, keys_of("ab"), now, now + 9))
        )

    def refuse(intent: Intent) -> Iterable[Completion]:
        assert isinstance(intent, Probe)
        load()  # others come to wait for it before it is refused
        load()
        return [ProbeDone(intent.op, Outcome.REFUSED)]

    remote = replace(store_of(None), remember=Remember())
    core = Core(CoreSettings(cpu=memory_of(8, 8), remote=remote))
    shared = SharedCore(core, lambda: 1.0, refuse)
    session: SessionId = core.open_session()
    space: SpaceId = core.attach(NAMESPACE, Parts([Part(0, 0, PAGE_BYTES)]), 16, session)
    load()
    assert [ticket.state for ticket in tickets] == [LoadState.SETTLED] * 3
