"""What the client's negative codes mean, as errors of the store contract. Pure functions."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from kvtiers.model.errors import RecordMissing, StoreError, StoreFull, StoreTransient, StoreUnavailable


class Code(IntEnum):
    """Those that are told apart."""

    NO_SPACE = -200
    BAD_ARGUMENT = -600
    ILLEGAL_CLIENT = -601
    """Somebody else began to write it meanwhile."""
    INVALID_READ = -701
    INVALID_REPLICA = -702
    NOT_READY = -703
    """Somebody is writing it, or has stopped in the middle."""
    MISSING = -704
    EXISTS = -705
    LEASED = -706
    """Somebody has read it lately."""
    LEASE_EXPIRED = -707
    """A read took longer than the master keeps what is being read."""
    TRANSFER = -800
    """The node whose memory it is does not answer."""
    RPC = -900
    """The master does not answer: refused, or gone."""
    RPC_TIMEOUT = -901


_MISSING: Final = frozenset({Code.MISSING, Code.NOT_READY, Code.INVALID_REPLICA, Code.INVALID_READ})
_PASSING: Final = frozenset(
    {Code.ILLEGAL_CLIENT, Code.EXISTS, Code.LEASED, Code.LEASE_EXPIRED, Code.RPC_TIMEOUT}
)


def error_of(code: int, what: str) -> StoreError:
    """For a call on `what` that gave a negative code."""
    told = f"{what}: Mooncake's code {code}"
    if code in _MISSING:
        return RecordMissing(f"{told}, not there")
    if code == Code.NO_SPACE:
        return StoreFull(f"{told}, no node has room for it; more memory must be lent, or eviction is behind")
    if code == Code.RPC_TIMEOUT:
        return StoreTransient(f"{told}, the master was too slow")
    if code in _PASSING:
        return StoreTransient(f"{told}, somebody else is using it")
    if code == Code.TRANSFER:
        return StoreUnavailable(f"{told}, the node that holds it does not answer")
    if code == Code.RPC:
        return StoreUnavailable(f"{told}, the master can't be reached")
    return StoreUnavailable(told)
