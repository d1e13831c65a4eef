"""Named values in a Mooncake Store. Any thread; waits and threads are `session.py`'s.

- Only the client's forms with addresses are used: its `get` gives empty bytes for every error.
- Raw payloads go from and into the arena itself. All else goes through registered blocks, one copy more.
- The engine has no step that swaps or compares. `swap` reads, then writes; `remove_if` reads, compares, then removes. Somebody may come
  between: of two writers one leaves pieces that nobody finds, and a reader may remove a manifest that was just replaced.
  Neither shows wrong bytes, as all are verified: the first costs memory until the engine evicts it, the second is a miss.
- What was read lately is under lease and is not removed but by force. Manifests are: whoever reads one just then finds it missing, or
  half overwritten, sees it by the digest behind it, and reads again. Pieces are not: their readers may finish, and eviction takes what is left.
- A node that has died is listed for 10 seconds more. Reads from it fail at once and are not tried again; writes are, and find
  another node.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Final, NamedTuple

import xxhash

from kvtiers.model.errors import RecordCorrupt, RecordMissing, StoreTransient
from kvtiers.records.codecs.base import Codec
from kvtiers.stores.base import RecordStore
from kvtiers.stores.call_time import CallTime
from kvtiers.stores.connections import Connections
from kvtiers.stores.key_values import KeyValues, Value
from kvtiers.stores.mooncake.codes import Code, error_of
from kvtiers.stores.mooncake.registered import Block, Blocks, Region, region_of
from kvtiers.stores.mooncake.session import Client, Session
from kvtiers.stores.mooncake.settings import MooncakeSettings
from kvtiers.stores.pieces import PiecedStore

_SMALL_BYTES: Final = 64 << 10
_DIGEST_BYTES: Final = 8
_READ_TRIES: Final = 6
_READ_PAUSE_S: Final = 0.002
_UPSERT_TRIES: Final = 8
_INTERRUPTED: Final = frozenset({Code.MISSING, Code.NOT_READY, Code.ILLEGAL_CLIENT})
"""An upsert that somebody else's, or a removal by force, has overtaken."""
_NOBODY: Final = "kv1:probe"


def mooncake_store(settings: MooncakeSettings, codec: Codec) -> RecordStore:
    """Records in the Mooncake Store that `settings` name."""
    return PiecedStore(MooncakeValues(settings), codec=codec)


class _Direct(NamedTuple):
    """Values in registered memory of the caller, as the client wants to be told."""

    names: list[str]
    addresses: list[int]
    sizes: list[int]


class MooncakeValues(KeyValues):
    """A client of a Mooncake Store that may also lend memory to it."""

    label = "mooncake"

    def __init__(self, settings: MooncakeSettings) -> None:
        self.piece_bytes = settings.piece_bytes
        self._session = Session(settings)
        self._timeout_s = settings.timeout_s
        self._time = CallTime()
        self._connections = Connections(settings.connection_pool_size, settings.timeout_s)
        waits = self._connections.waits
        self._pages = Blocks(settings.connection_pool_size, _SMALL_BYTES, settings.timeout_s, waits)
        self._bounce = Blocks(settings.bounce_buffers, settings.piece_bytes, settings.timeout_s, waits)
        for blocks in (self._pages, self._bounce):
            self._session.register(blocks.region)
        self._arena: Region | None = None
        self._lock = threading.Lock()
        self._bounced_bytes = 0
        self._transfers_failed = 0

    def use_memory(self, memory: memoryview) -> None:
        self._arena = region_of(memory)
        self._session.register(self._arena)

    def open(self) -> None:
        self._session.open()

    def within_time(self, seconds: float = math.inf) -> AbstractContextManager[object]:
        """No step begins later. One that is under way can't be ended: see `session.py`."""
        return self._time.within(min(seconds, self._timeout_s))

    def put(self, values: Sequence[Value]) -> None:
        direct, elsewhere = self._split(values)
        with self._call() as client:
            if direct.names:
                codes = client.batch_put_from(direct.names, direct.addresses, direct.sizes)
                for name, code in zip(direct.names, codes, strict=True):
                    self._check(code, name, writing=True)
            for name, memory in elsewhere:
                with self._bounce_block() as block:
                    block.memory[: memory.nbytes] = memory
                    (code,) = client.batch_put_from([name], [block.address], [memory.nbytes])
                self._check(code, name, writing=True)

    def get_into(self, values: Sequence[Value]) -> None:
        direct, elsewhere = self._split(values)
        with self._call() as client:
            if direct.names:
                lengths = client.batch_get_into(direct.names, direct.addresses, direct.sizes)
                for name, length, size in zip(direct.names, lengths, direct.sizes, strict=True):
                    self._check_length(length, name, size)
            for name, memory in elsewhere:
                with self._bounce_block() as block:
                    (length,) = client.batch_get_into([name], [block.address], [memory.nbytes])
                    self._check_length(length, name, memory.nbytes)
                    memory[:] = block.memory[: memory.nbytes]

    def swap(self, name: str, value: bytes) -> bytes | None:
        with self._call() as client, self._pages.take() as page:
            try:
                before = self._read_small(client, name, page)
            except RecordMissing:
                before = None
            sealed = value + xxhash.xxh3_64_digest(value)
            page.memory[: len(sealed)] = sealed
            for _ in range(_UPSERT_TRIES):
                (code,) = client.batch_upsert_from([name], [page.address], [len(sealed)])
                if code not in _INTERRUPTED:
                    self._check(code, name, writing=True)
                    return before
            raise StoreTransient(f"{name}: removed or written by others as fast as it was written here")

    def get(self, name: str) -> bytes:
        with self._call() as client, self._pages.take() as page:
            return self._read_small(client, name, page)

    def exists(self, names: Sequence[str]) -> list[bool]:
        with self._call() as client:
            found = client.batch_is_exist(list(names))
        for name, code in zip(names, found, strict=True):
            self._check(code, name)
        return [code == 1 for code in found]

    def remove(self, names: Sequence[str]) -> int:
        with self._call() as client:
            codes = client.batch_remove(list(names), False)
        for name, code in zip(names, codes, strict=True):
            if code in (Code.RPC, Code.RPC_TIMEOUT):
                self._check(code, name)
        return codes.count(0)

    def remove_if(self, name: str, value: bytes) -> bool:
        with self._call() as client, self._pages.take() as page:
            try:
                if self._read_small(client, name, page) != value:
                    return False
            except RecordMissing:
                return False
            (code,) = client.batch_remove([name], True)
            if code in (Code.MISSING, Code.NOT_READY):  # somebody else was faster
                return False
            self._check(code, name)
            return True

    def probe(self) -> None:
        """Asks the master; its own `health_check` says what the last heartbeat said."""
        self.exists([_NOBODY])

    def restarts(self) -> int:
        return self._session.reunions

    def close(self) -> None:
        self._session.close()

    def stats(self) -> Mapping[str, int]:
        """`bounced_bytes`: copied once more, as they were not in the arena. `transfers_failed`: with a node that holds memory."""
        with self._lock:
            counts = {"bounced_bytes": self._bounced_bytes, "transfers_failed": self._transfers_failed}
        return {**counts, **self._connections.stats()}

    # --- inside -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _call(self) -> Iterator[Client]:
        with self._time.within(self._timeout_s) as until, self._connections.use(until):
            self._check_time()
            with self._session.client(until) as client:
                yield client

    @contextmanager
    def _bounce_block(self) -> Iterator[Block]:
        self._check_time()
        with self._bounce.take(self._time.until) as block:
            yield block

    def _check_time(self) -> None:
        if time.monotonic() >= self._time.until:
            raise StoreTransient(f"it takes longer than {self._timeout_s:g} s")

    def _split(self, values: Sequence[Value]) -> tuple[_Direct, list[Value]]:
        """Those in the arena, and all others."""
        direct, elsewhere = _Direct([], [], []), []
        for value in values:
            region = region_of(value.memory)
            if self._arena is not None and self._arena.holds(*region):
                direct.names.append(value.name)
                direct.addresses.append(region.address)
                direct.sizes.append(region.nbytes)
            else:
                elsewhere.append(value)
        with self._lock:
            self._bounced_bytes += sum(value.memory.nbytes for value in elsewhere)
        return direct, elsewhere

    def _read_small(self, client: Client, name: str, page: Block) -> bytes:
        """Read again while it does not look whole; what stays wrong is given as it is, as its reader will find."""
        value = b""
        for number in range(_READ_TRIES):
            if number:
                time.sleep(_READ_PAUSE_S * number)  # whoever writes it may have to wait for a core
            (length,) = client.batch_get_into([name], [page.address], [_SMALL_BYTES])
            if length == Code.BAD_ARGUMENT:
                raise RecordCorrupt(f"{name} has more than {_SMALL_BYTES} bytes")
            self._check(length, name)
            value = bytes(page.memory[: max(0, length - _DIGEST_BYTES)])
            if page.memory[len(value) : length] == xxhash.xxh3_64_digest(value):
                break
        return value

    def _check_length(self, length: int, name: str, wanted: int) -> None:
        """Raise what a result of `batch_get_into` means."""
        if length == Code.BAD_ARGUMENT:
            raise RecordCorrupt(f"{name} has more than {wanted} bytes")
        self._check(length, name)
        if length != wanted:
            raise RecordCorrupt(f"{name} has {length} bytes, not {wanted}")

    def _check(self, code: int, name: str, *, writing: bool = False) -> None:
        """Raise what a negative code means."""
        if code >= 0:
            return
        if code == Code.RPC:
            self._session.doubt()
        if code == Code.TRANSFER:
            with self._lock:
                self._transfers_failed += 1
            if writing:
                raise StoreTransient(f"{name}: the node it should go to does not answer (code {code})")
        raise error_of(code, name)
