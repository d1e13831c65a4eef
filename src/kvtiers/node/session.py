"""What one connection may ask of the node, and what it holds there.

Two sessions of the core for each connection. Slots it may *write* to belong to the one: if the client is lost they go into
quarantine. Slots it may *read* belong to the other, which ends only when nobody reads them any more: a stopped process that goes
on later must not find other bytes in the middle of its copy.

Runs on the control thread, but for `_answered` and `_verify`, which run on the node's threads and only pass an op on.
"""

from __future__ import annotations

import json
import logging
import struct
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, groupby
from typing import Any, Final, NamedTuple, TypeAlias

from kvtiers.core.messages import MappersGone, OpId, Priority, SessionDied, SpaceId
from kvtiers.core.tickets import StoreTicket
from kvtiers.model.errors import KvtiersError
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Part, Parts
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.node import protocol as p
from kvtiers.node.claims import Claims
from kvtiers.node.framing import ProtocolError
from kvtiers.node.reports import Books
from kvtiers.records.header import ITEMSIZES, MAX_TOKENS
from kvtiers.runtime.loads import StagedLoad
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.pools import Job

_log = logging.getLogger(__name__)

MAX_HELD: Final = 4096
"""Loads and stores that one connection may have open."""
MAX_SPACES: Final = 64
"""Namespaces that one connection may attach."""

Late: TypeAlias = Callable[["EngineSession", int], None]
"""Called on any thread: the load of that op can be answered."""


class EngineSession:
    """One connection's loads, stores and namespaces."""

    def __init__(  # noqa: PLR0917 - what it works with, given once
        self,
        node: CacheNode,
        pid: int,
        claims: Claims,
        late: Late,
        stats: Callable[[], Any],
        books: Books,
    ) -> None:
        """`pid`: the client's process, `claims`: what that has open. `stats`: what is answered to `GetStats`, as plain values.

        Raises CacheClosed.
        """
        self._node = node
        self._claims = claims
        self._claimed = 0
        self._books = books
        self._stats_of_all = stats
        self._late = late
        self._reads = node.open_session(pid)
        self._writes = node.open_session(pid)
        self._spaces: dict[SpaceId, Parts] = {}
        self._loads: dict[int, _HeldLoad] = {}
        self._to_release: list[tuple[_HeldLoad, range]] = []
        self._stores: dict[int, _HeldStore] = {}
        self._lost = False
        self._stats_told = False
        self.report: p.Report | None = None
        self._handlers: dict[type, Callable[[Any], p.Answer | None]] = {
            p.Attach: self._attach,
            p.Detach: self._detach,
            p.Stage: self._stage,
            p.Release: self._release,
            p.OpenStore: self._open_store,
            p.Commit: self._commit,
            p.Abort: self._abort,
            p.Report: self._keep_report,
            p.GetStats: self._stats,
        }

    def handle(self, message: Any) -> p.Answer | None:
        """Do what one message asks; its answer, if there is one by now. Raises ProtocolError for what no client would send."""
        try:
            return self._handlers[type(message)](message)
        except ProtocolError:
            raise
        except KvtiersError as error:
            op = getattr(message, "op", None)
            if op is None:
                _log.warning("%s failed: %s", type(message).__name__, error)
                return None
            return p.Failed(op, str(error))

    def begin_turn(self) -> None:
        """Before what has arrived at one time is handled: the statistics, which cost a millisecond and 10 KB, are told once for it."""
        self._stats_told = False

    def end_turn(self) -> None:
        """After its answers were sent: the leases of 512 chunks take 0.2 ms to give back, and nobody waits for that. Idempotent."""
        while self._to_release:
            held, used = self._to_release.pop()
            held.release(used)

    def late_answer(self, op: int) -> p.Answer | None:
        """The answer that `late` announced; None if nobody waits for it any more."""
        held = self._loads.get(op)
        return self._staged(op, held) if held is not None and not held.told else None

    @property
    def holding(self) -> int:
        """Loads and stores open."""
        return len(self._loads) + len(self._stores)

    @property
    def oldest_s(self) -> float:
        """How long the one is open that has been for longest, in seconds; 0 without any. For any thread."""
        firsts = [  # in the order they were asked for
            *(load.since for load in list(self._loads.values())[:1]),
            *(store.since for store in list(self._stores.values())[:1]),
        ]
        return time.monotonic() - min(firsts) if firsts else 0.0

    @property
    def core_sessions(self) -> tuple[int, int]:
        """The core's sessions that lease for it: reads, writes."""
        return self._reads, self._writes

    def lose(self) -> None:
        """The connection is over, but the client's process may still use what it was given. Idempotent.

        What it was not told of yet goes back at once.
        """
        if self._lost:
            return
        self._lost = True
        self.end_turn()
        for op, held in list(self._loads.items()):
            if not held.told:
                del self._loads[op]
                held.release(range(0))
        self._node.tell([SessionDied(self._writes)])
        self._stores.clear()

    def let_go(self) -> None:
        """Nobody uses what it was given any more."""
        self.lose()
        self._loads.clear()
        self._claim(-self._claimed)
        self._node.close_session(self._reads)
        self._node.tell([MappersGone(self._writes)])

    # --- requests -----------------------------------------------------------------------------------------------------

    def _attach(self, message: p.Attach) -> p.Answer:
        if len(self._spaces) >= MAX_SPACES:
            return p.Failed(message.op, f"a connection attaches at most {MAX_SPACES} namespaces")
        if message.itemsize not in ITEMSIZES or message.chunk_tokens > MAX_TOKENS:
            return p.Failed(
                message.op,
                f"records hold elements of {', '.join(map(str, ITEMSIZES))} bytes and chunks of at most {MAX_TOKENS} tokens, "
                f"not of {message.itemsize} bytes and {message.chunk_tokens} tokens",
            )
        parts = Parts([Part(*part) for part in message.parts])
        space = self._node.attach(
            message.namespace,
            parts,
            chunk_tokens=message.chunk_tokens,
            itemsize=message.itemsize,
            session=self._reads,
        )
        self._spaces[space] = parts
        return p.Attached(message.op, space)

    def _detach(self, message: p.Detach) -> None:
        space = self._space(message.space)
        del self._spaces[space]
        self._node.detach(self._reads, space)

    def _stage(self, message: p.Stage) -> p.Answer | None:
        space = self._space(message.space)
        keys = _keys(message.keys)
        too_much = self._too_much(space, keys)
        if too_much is not None:
            return p.Failed(message.op, too_much)
        self._check_new(message.op)
        load = self._node.open_load(self._reads, space, keys, message.timeout_ms / 1000, touch_later=True)
        held = self._loads[message.op] = _HeldLoad(load)
        if load.answered and not self._node.plan.verify_on_hit:
            return self._staged(message.op, held)
        load.when_answered(partial(self._answered, message.op, held))
        return None

    def _release(self, message: p.Release) -> None:
        held = self._loads.pop(message.op, None)
        if held is None:
            return
        if not held.told:
            held.release(range(0))
            return
        ticket = held.load.ticket
        used = range(message.begin, ticket.num_chunks if message.end is None else message.end)
        chunks = len(ticket.tiers[used.start : used.stop])
        self._books.savings.add(chunks * ticket.space.chunk_tokens, self.report)
        self._to_release.append((held, used))

    def _open_store(self, message: p.OpenStore) -> p.Answer:
        space = self._space(message.space)
        keys = _keys(message.keys)
        too_much = self._too_much(space, keys)
        if too_much is not None:
            return p.Failed(message.op, too_much)
        self._check_new(message.op)
        root = ChunkKey(message.root)
        room = self._claims.room(self._spaces[space].slot_bytes)
        ticket = self._node.open_store(self._writes, space, root, keys, first=message.first, room=room)
        if ticket.copies:
            self._stores[message.op] = _HeldStore(ticket, time.monotonic())
            self._claim(len(ticket.copies) * ticket.space.slot_bytes)
        accepted = ticket.accepted
        return p.Opened(
            message.op,
            struct.pack(f"<{len(accepted)}I", *(slot.index for slot in accepted)),
            _packed([slot.slots for slot in accepted]),
            _runs(ticket.refused),
        )

    def _commit(self, message: p.Commit) -> p.Answer:
        held = self._stores.get(message.store)
        if held is None or not held.ticket.copies.keys() >= set(message.indices or ()):
            return p.Failed(message.op, "these chunks are not open: committed or aborted before?")
        ticket = held.ticket
        before = len(ticket.copies)
        self._node.commit(ticket, message.indices)
        self._claim((len(ticket.copies) - before) * ticket.space.slot_bytes)
        if not ticket.copies:
            del self._stores[message.store]
        return p.Committed(message.op)

    def _abort(self, message: p.Abort) -> None:
        held = self._stores.pop(message.store, None)
        if held is not None:
            self._claim(-len(held.ticket.copies) * held.ticket.space.slot_bytes)
            self._node.abort(held.ticket)

    def _keep_report(self, message: p.Report) -> None:
        self.report = message
        self._books.local_hits.add(message)

    def _stats(self, message: p.GetStats) -> p.Answer:
        if self._stats_told:
            return p.Failed(message.op, "statistics are told once at a time: ask again after the answer")
        self._stats_told = True
        return p.Stats(message.op, json.dumps(self._stats_of_all(), default=str).encode())

    # --- inside -------------------------------------------------------------------------------------------------------

    def _claim(self, nbytes: int) -> None:
        self._claimed += nbytes
        self._claims.nbytes += nbytes

    def _space(self, number: int) -> SpaceId:
        space = SpaceId(number)
        if space not in self._spaces:
            raise ProtocolError(f"namespace {number} is not attached on this connection")
        return space

    def _too_much(self, space: SpaceId, keys: Sequence[ChunkKey]) -> str | None:
        if self.holding >= MAX_HELD:
            return f"{MAX_HELD} loads and stores are open: release some"
        if len(keys) * len(self._spaces[space]) > p.MAX_SLOTS:
            return f"one request is about {p.MAX_SLOTS} parts of chunks at most"
        return None

    def _check_new(self, op: int) -> None:
        if op in self._loads or op in self._stores:
            raise ProtocolError(f"op {op} is in use on this connection")

    def _staged(self, op: int, held: _HeldLoad) -> p.Answer:
        held.told = True
        ticket, stopped_by = held.load.ticket, held.load.stopped_by
        # `load.slots()` takes a third of the time of all of this
        slots = [copy.slots for copy in ticket.copies if copy is not None]
        if not slots:  # nothing to hold
            self._loads.pop(op, None)
            held.release()
        return p.Staged(
            op,
            _packed(slots),
            bytes(map(p.TIER_CODE.__getitem__, ticket.tiers)),
            None if stopped_by is None else str(stopped_by),
        )

    def _answered(self, op: int, held: _HeldLoad) -> None:
        """On whichever thread brought the answer. With `verify_on_hit`, checksums are the memory pool's work."""
        if self._node.plan.verify_on_hit and any(slot.tier is Tier.CPU for slot in held.load.slots()):
            verify = partial(self._verify, op, held)
            if self._node.engine.run_in_memory_pool(Job(OpId(0), Priority.LOAD, verify, verify)):
                return
            _log.info(
                "a load is answered with nothing: too many wait to be verified, or the cache is closing"
            )
            if held.begin_verifying():
                try:
                    self._node.cut(held.load.ticket, 0, MissReason.STAGING_TIMEOUT)
                finally:
                    held.end_verifying()
        self._late(self, op)

    def _verify(self, op: int, held: _HeldLoad) -> None:
        """On a memory worker: the answer ends before the first chunk whose bytes are not what was committed."""
        if not held.begin_verifying():
            return
        try:
            for index, slot in enumerate(held.load.slots()):
                if slot.tier is Tier.CPU and not self._node.is_intact(held.load.ticket, index):
                    _log.warning("a chunk in memory is not what was committed to it: it is dropped")
                    self._node.cut(held.load.ticket, index)
                    break
        except Exception:  # noqa: BLE001 - unverified is not served
            _log.exception("a chunk could not be verified; this is a bug in kvtiers")
            self._node.cut(held.load.ticket, 0, MissReason.STAGING_TIMEOUT)
        finally:
            held.end_verifying()
        self._late(self, op)


class _HeldStore(NamedTuple):
    """A store that a client has open."""

    ticket: StoreTicket
    since: float


class _HeldLoad:
    """A load that a client holds. Its leases are not given back while it is being verified."""

    __slots__ = ("_lock", "_released", "_used", "_verifying", "load", "since", "told")

    def __init__(self, load: StagedLoad) -> None:
        self.load = load
        self.since = time.monotonic()
        self.told = False
        """Whether the client was given its slots."""
        self._lock = threading.Lock()
        self._verifying = False
        self._released = False
        self._used: range | None = None

    def release(self, used: range | None = None) -> None:
        with self._lock:
            self._released, self._used = True, used
            if self._verifying:
                return
        self.load.release(used)

    def begin_verifying(self) -> bool:
        with self._lock:
            self._verifying = not self._released
            return self._verifying

    def end_verifying(self) -> None:
        with self._lock:
            self._verifying = False
            if not self._released:
                return
        self.load.release(self._used)


def _keys(packed: bytes) -> list[ChunkKey]:
    try:
        return p.split_keys(packed)
    except ValueError as error:
        raise ProtocolError(str(error)) from None


def _packed(slots: list[tuple[int, ...]]) -> bytes:
    flat = list(chain.from_iterable(slots))
    return struct.pack(f"<{len(flat)}Q", *flat)


def _runs(refused: Sequence[tuple[int, Any]]) -> list[tuple[int, int, str]]:
    """Neighbours refused for one reason, as (first index, count, reason)."""
    runs = []
    for (_, reason), group in groupby(enumerate(refused), key=lambda one: (one[1][0] - one[0], one[1][1])):
        members = [index for _, (index, _) in group]
        runs.append((members[0], len(members), str(reason)))
    return runs
