"""Redis, Valkey and their like as an engine of named values. Any thread, several at once.

Each call has one deadline for all it does: waiting for a place, finding the server, connecting, sending, receiving. In a cluster a shard that has failed is
left alone for a moment (`_REST_S`): what lies on it is a miss meanwhile, and the others go on. Only when no shard answers is the
engine unavailable. With one server the guard around the store does all of that.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from typing import Final, TypeVar

from kvtiers.model.errors import (
    RecordCorrupt,
    RecordMissing,
    StoreError,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.stores.call_time import CallTime
from kvtiers.stores.key_values import KeyValues, Value
from kvtiers.stores.redis.dialling import Dialler, broken, info_field, refused
from kvtiers.stores.redis.routes import ClusterSlots, OneServer, Routes, SentinelMaster, shared_out
from kvtiers.stores.redis.runs import Runs
from kvtiers.stores.redis.settings import Address, RedisSettings, Topology, read_endpoint
from kvtiers.stores.redis.wire import ErrorReply, Reply, Wire, WireBroken, WrongLength
from kvtiers.stores.redis.wires import Wires

_REST_S: Final = 1.0
"""A shard that has failed is not asked for so long."""
_AHEAD: Final = 2
"""GETs sent before the reply to the first has been read: the server never waits, and never has more than this to keep for us."""
_MOVES: Final = 2
"""How often a call follows the cluster to another server."""
_REMOVE_IF: Final = (
    b"if redis.call('GET',KEYS[1])==ARGV[1] then return redis.call('DEL',KEYS[1]) end return 0"
)

T = TypeVar("T")


class Event(StrEnum):
    """What is counted; names in `stats()`."""

    MOVED = "moved"
    """Replies that sent us to another server."""
    LOST_SHARD = "lost_shard"
    """Calls that did without a shard of the cluster."""


class _Moved(Exception):
    """Another server has it now."""


class _SlotMoving(StoreTransient):
    """One slot of the cluster is on its way from one server to another; both work."""


_ON_THE_MOVE: Final = frozenset({"ASK", "TRYAGAIN"})


class RedisValues(KeyValues):
    """A client of one engine."""

    label = "redis"

    def __init__(self, settings: RedisSettings) -> None:
        self.piece_bytes = settings.piece_bytes
        self._settings = settings
        self._endpoint = read_endpoint(settings.endpoint)
        self._expiry = () if settings.ttl_s is None else (b"EX", b"%d" % settings.ttl_s)
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(Event, 0)
        self._resting: dict[Address, tuple[float, str]] = {}
        """Shards that have failed: until when they are left alone, and what was wrong."""
        self._used_bytes = 0
        self._time = CallTime()
        self._wires: Wires | None = None
        self._routes: Routes = OneServer(self._endpoint.addresses[0])
        self._dialler: Dialler | None = None
        self._sentinels: Dialler | None = None
        self._runs = Runs()

    # --- contract -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        self._dialler = Dialler(self._settings)
        self._wires = Wires(self._dial, self._settings.connection_pool_size, self._settings.timeout_s)
        if self._endpoint.topology is Topology.CLUSTER:
            self._routes = ClusterSlots(self._endpoint.addresses, self._ask)
        elif self._endpoint.topology is Topology.SENTINEL:
            self._sentinels = Dialler(self._settings, sentinels=True)
            self._routes = SentinelMaster(self._endpoint.addresses, self._endpoint.master, self._ask_sentinel)

    def within_time(self, seconds: float = math.inf) -> AbstractContextManager[object]:
        return self._time.within(min(seconds, self._settings.timeout_s))

    def put(self, values: Sequence[Value]) -> None:
        """All of one call go to one server: their names share what stands in braces."""

        def put(wire: Wire, deadline: float) -> None:
            wire.send(
                [(b"SET", value.name.encode(), value.memory, *self._expiry) for value in values], deadline
            )
            replies = [wire.reply(deadline) for _ in values]
            for reply in replies:
                self._checked(reply, wire.address)

        if values:
            self._at(values[0].name, put)

    def swap(self, name: str, value: bytes) -> bytes | None:
        reply = self._one(name, b"SET", name.encode(), value, b"GET", *self._expiry)
        return reply if isinstance(reply, bytes) else None

    def get(self, name: str) -> bytes:
        reply = self._one(name, b"GET", name.encode(), lost_is_missing=True)
        if not isinstance(reply, bytes):
            raise RecordMissing(f"{name} is not there")
        return reply

    def get_into(self, values: Sequence[Value]) -> None:
        """All of one call come from one server, as with `put`."""

        def get(wire: Wire, deadline: float) -> None:
            commands = [(b"GET", value.name.encode()) for value in values]
            wire.send(commands[:_AHEAD], deadline)
            missing: str | None = None
            trouble: ErrorReply | None = None
            for number, value in enumerate(values):
                found = wire.value_into(value.memory, deadline)
                wire.send(commands[number + _AHEAD : number + _AHEAD + 1], deadline)
                if isinstance(found, ErrorReply):
                    trouble = trouble or found
                elif not found:
                    missing = missing or value.name
            if trouble is not None:
                self._checked(trouble, wire.address)
            if missing is not None:
                raise RecordMissing(f"{missing} is not there")

        if values:
            self._at(values[0].name, get, lost_is_missing=True)

    def exists(self, names: Sequence[str]) -> list[bool]:
        found = [False] * len(names)
        commands = [(b"EXISTS", name.encode()) for name in names]
        with self._call() as deadline:
            for _ in range(_MOVES + 1):
                groups: dict[Address, list[int]] = {}
                for number, (_, name) in enumerate(commands):
                    groups.setdefault(self._routes.of(name, deadline), []).append(number)

                def ask(address: Address, until: float, groups: dict[Address, list[int]] = groups) -> None:
                    numbers = groups[address]
                    replies = self._ask(address, [commands[number] for number in numbers], until)
                    for number, reply in zip(numbers, replies, strict=True):
                        moving = isinstance(reply, ErrorReply) and reply.code in _ON_THE_MOVE
                        found[number] = not moving and self._checked(reply, address) == 1

                try:
                    self._each(self._without_lost(list(groups), deadline), ask, deadline)
                except _Moved:
                    continue
                return found
        raise StoreTransient("the cluster is being rearranged")

    def remove(self, names: Sequence[str]) -> int:
        """All of one call are on one server, as with `put`."""
        if not names:
            return 0
        reply = self._one(names[0], b"UNLINK", *(name.encode() for name in names))
        return reply if isinstance(reply, int) else 0

    def remove_if(self, name: str, value: bytes) -> bool:
        return self._one(name, b"EVAL", _REMOVE_IF, b"1", name.encode(), value) == 1

    def probe(self) -> None:
        used: list[int] = []

        def ask(address: Address, until: float) -> None:
            pong, memory = self._ask(address, [(b"PING",), (b"INFO", b"memory")], until)
            self._checked(pong, address)
            told = info_field(memory, b"used_memory")
            used.append(int(told) if told.isdigit() else 0)

        with self._call() as deadline:
            servers = sorted(self._routes.all(deadline), key=lambda one: self._problem_of(one) is not None)
            self._each(servers, ask, deadline)
        self._used_bytes = sum(used)

    def close(self) -> None:
        if self._wires is not None:
            self._wires.close()

    def used_bytes(self) -> int:
        return self._used_bytes

    def restarts(self) -> int:
        """A server that was restarted has ended every connection, so the next one made tells."""
        return self._runs.restarts()

    def stats(self) -> Mapping[str, int]:
        with self._lock:
            counts = {str(event): count for event, count in self._counts.items()}
        return {**counts, **(self._wires.stats() if self._wires is not None else {})}

    # --- calls --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _call(self) -> Iterator[float]:
        """A place among the connections, and the deadline of the call that has it."""
        if self._wires is None or self._wires.closed():
            raise StoreUnavailable("the store is closed")
        with self._time.within(self._settings.timeout_s) as deadline, self._wires.place(deadline):
            yield deadline

    def _one(self, name: str, *command: bytes, lost_is_missing: bool = False) -> Reply:
        """A small command to the server that has `name`, and its reply."""

        def ask(wire: Wire, deadline: float) -> Reply:
            (reply,) = wire.ask([command], deadline)
            return self._checked(reply, wire.address)

        return self._at(name, ask, lost_is_missing=lost_is_missing)

    def _at(self, name: str, work: Callable[[Wire, float], T], *, lost_is_missing: bool = False) -> T:
        """Work on a wire to the server that has `name`; again if the cluster says that it is another one."""
        with self._call() as deadline:
            for _ in range(_MOVES + 1):
                address = self._routes.of(name.encode(), deadline)
                problem = self._problem_of(address)
                if problem is not None:
                    self._count(Event.LOST_SHARD)
                    if lost_is_missing and self._another_works(deadline):
                        raise RecordMissing(f"{name} is on a shard that is lost: {problem}")
                    raise StoreUnavailable(problem)
                try:
                    with self._wire(address, deadline) as wire:
                        return work(wire, deadline)
                except _Moved:
                    continue
                except _SlotMoving as error:
                    if lost_is_missing:
                        raise RecordMissing(f"{name}: {error}") from None
                    raise
        raise StoreTransient("the cluster is being rearranged")

    def _each(
        self, addresses: Sequence[Address], work: Callable[[Address, float], None], deadline: float
    ) -> None:
        """Work with each server in turn; those that fail are left out, unless all do."""
        trouble: StoreError | None = None
        lost = 0
        for address, until in shared_out(addresses, deadline):
            try:
                work(address, until)
            except (StoreTransient, StoreUnavailable) as error:
                trouble = error
                lost += 1
        if trouble is not None:
            if lost == len(addresses):
                raise trouble
            self._count(Event.LOST_SHARD)

    def _without_lost(self, addresses: Sequence[Address], deadline: float) -> list[Address]:
        """Those that are not left alone for now. Raises StoreUnavailable if no server works, of these or others."""
        problems = {address: self._problem_of(address) for address in addresses}
        working = [address for address, problem in problems.items() if problem is None]
        if len(working) < len(addresses):
            self._count(Event.LOST_SHARD)
            if not working and not self._another_works(deadline):
                raise StoreUnavailable(str(problems[addresses[0]]))
        return working

    def _ask(self, address: Address, commands: Sequence[Sequence[bytes]], deadline: float) -> list[Reply]:
        with self._wire(address, deadline) as wire:
            return wire.ask(commands, deadline)

    def _ask_sentinel(
        self, address: Address, commands: Sequence[Sequence[bytes]], deadline: float
    ) -> list[Reply]:
        """Over a connection that is not kept: this is rare. The call that asks has its place, and no wire yet."""
        assert self._sentinels is not None
        assert self._wires is not None
        try:
            with self._wires.once(self._sentinels.dial, address, deadline) as wire:
                return wire.ask(commands, deadline)
        except WireBroken as error:
            raise broken(address, error) from None

    def _dial(self, address: Address, deadline: float) -> Wire:
        assert self._dialler is not None
        wire = self._dialler.dial(address, deadline)
        self._runs.met(address, wire.run)
        return wire

    @contextmanager
    def _wire(self, address: Address, deadline: float) -> Iterator[Wire]:
        """A wire, whose troubles are the store's, and are remembered."""
        assert self._wires is not None
        try:
            with self._wires.to(address, deadline) as wire:
                yield wire
        except WrongLength as error:
            raise RecordCorrupt(f"a value has {error}") from None
        except WireBroken as error:
            trouble = broken(address, error)
            self._failed(address, trouble)
            if self._wires.closed():
                raise StoreUnavailable("the store is closed") from None
            raise trouble from None
        except _SlotMoving:
            raise
        except (StoreTransient, StoreUnavailable) as error:
            self._failed(address, error)
            raise
        if self._resting:
            with self._lock:
                self._resting.pop(address, None)

    def _checked(self, reply: Reply, address: Address) -> Reply:
        """The reply, unless it is a refusal. Raises what that means."""
        if not isinstance(reply, ErrorReply):
            return reply
        if reply.code in ("MOVED", "READONLY"):
            self._routes.doubt()
            self._count(Event.MOVED)
            if self._endpoint.topology is not Topology.SERVER:
                raise _Moved
        if reply.code in _ON_THE_MOVE:
            raise _SlotMoving(f"{address} is giving its slot to another server, or getting it")
        raise refused(address, reply.code, reply.text)

    # --- what has failed ----------------------------------------------------------------------------------------------

    def _failed(self, address: Address, error: StoreError) -> None:
        self._routes.doubt()
        if self._endpoint.topology is Topology.CLUSTER:
            now = time.monotonic()
            with self._lock:
                resting = {one: rest for one, rest in self._resting.items() if now < rest[0]}
                self._resting = {**resting, address: (now + _REST_S, str(error))}

    def _problem_of(self, address: Address) -> str | None:
        """What was wrong with a shard that is left alone for now."""
        until, problem = self._resting.get(address, (0.0, ""))
        return problem if time.monotonic() < until else None

    def _another_works(self, deadline: float) -> bool:
        return any(self._problem_of(address) is None for address in self._routes.all(deadline))

    def _count(self, event: Event) -> None:
        with self._lock:
            self._counts[event] += 1
