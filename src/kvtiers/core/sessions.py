"""The core's clients: what happens to their tickets and leases when they go."""

from __future__ import annotations

from kvtiers.core.index import Space
from kvtiers.core.ledger import Ledger
from kvtiers.core.loading import Loading
from kvtiers.core.messages import SessionId
from kvtiers.core.state import State
from kvtiers.core.storing import Storing
from kvtiers.core.tickets import LoadTicket, Session
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.reasons import MissReason


class Sessions(dict[SessionId, Session]):
    """Those that are open, or dead and not yet known to have let go of the arena."""

    def __init__(self, state: State, ledger: Ledger, loading: Loading, storing: Storing) -> None:
        super().__init__()
        self._state = state
        self._ledger = ledger
        self._loading = loading
        self._storing = storing

    def living(self, session_id: SessionId) -> Session:
        """Raises InvariantBroken for one that is dead or was never opened."""
        session = self.get(session_id)
        if session is None or session.dead:
            raise InvariantBroken(f"session {session_id} is not open")
        return session

    def died(self, session_id: SessionId) -> None:
        """Its loads are released; what it was storing goes into quarantine: it, or a fork of it, may still write there."""
        session = self.get(session_id)
        if session is None or session.dead:
            return
        session.dead = True
        for ticket in list(session.tickets.values()):
            if isinstance(ticket, LoadTicket):
                self._loading.release(ticket, used=range(0))
                continue
            self._storing.unpin(ticket)
            for copy in ticket.copies.values():  # the client, or a fork of it, may still write there
                self._ledger.detach(copy, MissReason.NEVER_SEEN)
                session.quarantine.append(copy)
            ticket.copies.clear()
        session.tickets.clear()

    def mappers_gone(self, session_id: SessionId) -> None:
        """Nobody can write to the arena for it any more."""
        self.died(session_id)
        session = self.pop(session_id, None)
        if session is not None:
            for copy in session.quarantine:
                self._ledger.unlease(copy)
            for space in list(session.spaces):
                self.let_go_of(session, space)

    def let_go_of(self, session: Session, space: Space) -> None:
        """It asks for nothing of that namespace any more."""
        if space in session.spaces:
            del session.spaces[space]
            space.attached -= 1
            self._state.index.forget_space(space)
