"""Records of one engine, one at a time on one thread, against the engine's own client used by hand with the same memory.

Each engine has a process of its own, this module: a client that hangs or dies takes nothing with it, and Mooncake, whose ports are
open to every address, gets a network of its own.

    python -m kvtiers.ops.bench.remote_records BACKEND SHAPE ROUNDS FOLDER     prints {"store, written": [seconds, …], …}
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from kvtiers.config import CacheConfig
from kvtiers.model.errors import InvariantBroken, KvtiersError
from kvtiers.ops.bench.figures import Figure, at_least, at_most, compare, rates, times
from kvtiers.ops.bench.limits import Bytes, flat, prefaulted
from kvtiers.ops.bench.measure import Contestant, interleave, seconds_of
from kvtiers.ops.bench.record_turns import COMPRESSED, TIMEOUT_MS, bench_store, part_of, ref_of
from kvtiers.ops.bench.shapes import SHAPES, Shape, synthetic_kv
from kvtiers.ops.engines import Engine, throw_away, wants_own_network, why_not
from kvtiers.records.checksum import checksum
from kvtiers.runtime.remote_plan import what_is_missing
from kvtiers.stores.base import RecordStore

CLIENT_TARGET: Final = at_least(0.85)
EXISTS_TARGET_MS: Final = at_most(3.0)
EXISTS_KEYS: Final = 512
NAMES: Final = {"mooncake": "Mooncake", "s3": "SeaweedFS (S3)"}
_TURN_BYTES: Final = 64 << 20
_CHILD_DEADLINE_S: Final = 1800.0
_EXISTS_CALLS: Final = 20
_WRITTEN: Final = "store, written"
_READ: Final = "store, read"
_PACKED_WRITTEN: Final = f"store, written, {COMPRESSED}"
_PACKED_READ: Final = f"store, read, {COMPRESSED}"
_PUT: Final = "its own client, put"
_GOT: Final = "its own client, got"


def records_a_turn(shape: Shape) -> int:
    """About 64 MiB, two at least."""
    return max(2, min(shape.chunks, _TURN_BYTES // shape.chunk_bytes))


def room_for_records(shape: Shape, rounds: int) -> int:
    """Bytes on disk: an object store gives back late what is deleted."""
    return 10 * (rounds + 2) * records_a_turn(shape) * shape.chunk_bytes


def why_not_measured(backend: str) -> str | None:
    """What is missing for it here; None if nothing is."""
    remote = CacheConfig.from_mapping(
        {"storage": {"remote": {"enabled": True, "backend": backend, "endpoint": "nowhere:1"}}}, environ={}
    ).storage.remote
    return what_is_missing(remote) or why_not(backend)


def bench_records(backend: str, shape: Shape, rounds: int, directory: Path) -> list[Figure]:
    """In a process of its own. Raises KvtiersError if that fails, with what it said."""
    taken = _in_new_process(backend, shape, rounds, directory / f"{backend}-{shape.name}")
    nbytes = records_a_turn(shape) * shape.chunk_bytes
    series = {name: rates(name, seconds, nbytes) for name, seconds in taken.items()}
    return [
        Figure(
            "remote",
            f"{NAMES[backend]}, {what}",
            series[ours],
            shape.name,
            comparisons=(compare(series[ours], series[theirs], target),),
        )
        for what, ours, theirs, target in (
            ("read", _READ, _GOT, CLIENT_TARGET),
            ("write", _WRITTEN, _PUT, CLIENT_TARGET),
            (f"read, {COMPRESSED}", _PACKED_READ, _READ, None),
            (f"write, {COMPRESSED}", _PACKED_WRITTEN, _WRITTEN, None),
        )
    ]


def bench_existence(engine: Engine, rounds: int) -> Figure:
    """One call for 512 keys, of which every other one is there."""
    store = bench_store(engine)
    store.open()
    try:
        page = prefaulted(4096).data
        refs = [ref_of(number) for number in range(EXISTS_KEYS)]
        for ref in refs[::2]:
            store.write(part_of(ref, page))
        expected = [number % 2 == 0 for number in range(EXISTS_KEYS)]
        if store.exists(refs) != expected:
            raise InvariantBroken("the server does not say what is there")
        seconds = [seconds_of(lambda: store.exists(refs)) for _ in range(rounds * _EXISTS_CALLS)]
    finally:
        store.close()
    name = f"Valkey, whether {EXISTS_KEYS} keys are there"
    return Figure("remote", name, times("exists", seconds), target=EXISTS_TARGET_MS)


# --- in the process of the engine ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Hand:
    """An engine's own client, used as anybody would."""

    put: Callable[[str, memoryview], None]
    get: Callable[[str, memoryview], None]
    close: Callable[[], object]


def measure(backend: str, shape: Shape, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of every turn. Raises EngineUnavailable, StoreError."""
    count, size = records_a_turn(shape), shape.chunk_bytes
    memory = prefaulted(2 * count * size)
    memory[: count * size] = flat(synthetic_kv(shape, count * shape.chunk_tokens))
    sources, targets = (
        [memory[start : start + size].data for start in range(first, first + count * size, size)]
        for first in (0, count * size)
    )
    with throw_away(backend, folder) as engine:
        stores = bench_store(engine), bench_store(engine, COMPRESSED)
        for store in stores:
            store.use_memory(memory.data)
            store.open()
        hand = _HANDS[backend](engine, memory)
        try:
            turns = _Turns(stores, hand, engine, sources, targets)
            return interleave(turns.contestants(), rounds)
        finally:
            hand.close()
            for store in stores:
                store.close()


class _Turns:
    """All with the same memory, each with names of its own."""

    def __init__(
        self,
        stores: tuple[RecordStore, RecordStore],
        hand: _Hand,
        engine: Engine,
        sources: Sequence[memoryview],
        targets: Sequence[memoryview],
    ) -> None:
        """`stores`: one that writes raw records, and one that compresses."""
        self._raw, self._packed = stores
        self._hand, self._engine = hand, engine
        self._sources, self._targets = sources, targets
        self._sums = [checksum(source) for source in sources]
        self._number = 0

    def contestants(self) -> dict[str, Contestant]:
        """By name."""
        return {
            _WRITTEN: lambda: self._written(self._raw),
            _PUT: self._put,
            _READ: lambda: self._read(self._raw),
            _GOT: self._got,
            _PACKED_WRITTEN: lambda: self._written(self._packed),
            _PACKED_READ: lambda: self._read(self._packed),
        }

    def _written(self, store: RecordStore) -> float:
        parts = [part_of(ref_of(self._next()), source, known) for source, known in self._given()]
        self._engine.clear()
        return seconds_of(lambda: [store.write(part) for part in parts])

    def _read(self, store: RecordStore) -> float:
        self._written(store)
        refs = [ref_of(self._number - len(self._sources) + at + 1) for at in range(len(self._sources))]
        seconds = seconds_of(
            lambda: [
                store.read_into(ref, target, len(target))
                for ref, target in zip(refs, self._targets, strict=True)
            ]
        )
        self._compare()
        return seconds

    def _put(self) -> float:
        names = [f"by-hand/{self._next()}" for _ in self._sources]
        self._engine.clear()

        def work() -> None:
            for name, one in zip(names, self._sources, strict=True):
                self._hand.put(name, one)

        return seconds_of(work)

    def _got(self) -> float:
        self._put()
        first = self._number - len(self._sources) + 1
        names = [f"by-hand/{first + at}" for at in range(len(self._sources))]

        def work() -> None:
            for name, one in zip(names, self._targets, strict=True):
                self._hand.get(name, one)

        seconds = seconds_of(work)
        self._compare()
        return seconds

    def _compare(self) -> None:
        """Whether the bytes came, each time anew."""
        if [checksum(target) for target in self._targets] != self._sums:
            raise InvariantBroken("what was read is not what was written")
        for target in self._targets:
            np.frombuffer(target, np.uint8)[:] = 0

    def _given(self) -> list[tuple[memoryview, bytes]]:
        return list(zip(self._sources, self._sums, strict=True))

    def _next(self) -> int:
        self._number += 1
        return self._number


def _mooncake_by_hand(engine: Engine, memory: Bytes) -> _Hand:
    from mooncake.store import MooncakeDistributedStore

    client: Any = MooncakeDistributedStore()
    host = engine.endpoint.partition(":")[0]
    base = memory.ctypes.data
    done = client.setup(host, "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", engine.endpoint)
    if done or client.register_buffer(base, len(memory)):
        raise InvariantBroken("Mooncake's client can't be made ready")

    def check(code: int, least: int) -> None:
        if code < least:
            raise InvariantBroken(f"Mooncake's client answered {code}")

    def address(view: memoryview) -> int:
        return int(np.frombuffer(view, np.uint8).ctypes.data)

    return _Hand(
        lambda name, view: check(client.put_from(name, address(view), len(view)), 0),
        lambda name, view: check(client.get_into(name, address(view), len(view)), len(view)),
        client.close,
    )


def _s3_by_hand(engine: Engine, _: Bytes) -> _Hand:
    import obstore

    from kvtiers.stores.s3 import S3Settings
    from kvtiers.stores.s3.client import make_client

    client = make_client(S3Settings(engine.endpoint, timeout_s=TIMEOUT_MS / 1000, **engine.settings["s3"]))

    def get(name: str, view: memoryview) -> None:
        found = obstore.get(client, name)
        if len(view) <= _S3_AT_ONCE:
            view[:] = memoryview(found.bytes()).cast("B")
            return
        place = 0
        for piece in found.stream(min_chunk_size=_S3_PIECE):
            view[place : place + len(piece)] = memoryview(piece).cast("B")
            place += len(piece)
        if place != len(view):
            raise InvariantBroken(f"S3's client gave {place} bytes of {len(view)}")

    def put(name: str, view: memoryview) -> None:
        obstore.put(client, name, view, use_multipart=False)

    return _Hand(put, get, lambda: None)


_S3_AT_ONCE: Final = 8 << 20
_S3_PIECE: Final = 1 << 20
"""Of several ways to use the client by hand the best: large values in pieces, small ones whole."""

_HANDS: Final[dict[str, Callable[[Engine, Bytes], _Hand]]] = {
    "mooncake": _mooncake_by_hand,
    "s3": _s3_by_hand,
}


def _in_new_process(backend: str, shape: Shape, rounds: int, folder: Path) -> dict[str, list[float]]:
    from kvtiers.testing.own_network import in_own_network

    words = [backend, shape.name, str(rounds), str(folder)]
    command: list[str] | None = [sys.executable, "-m", "kvtiers.ops.bench.remote_records", *words]
    if wants_own_network(backend):
        command = in_own_network(command or []) or command
    try:
        done = subprocess.run(  # noqa: S603 - our own module, with paths of our own
            command or [],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_CHILD_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InvariantBroken(f"it had not ended after {_CHILD_DEADLINE_S:.0f} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise InvariantBroken(said[-1] if said else f"exit code {done.returncode}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=dict[str, list[float]])


def main(arguments: Sequence[str]) -> int:
    """Entry point of the new process."""
    backend, shape, rounds, folder = arguments
    try:
        taken = measure(backend, SHAPES[shape], int(rounds), Path(folder))
    except KvtiersError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(taken) + b"\n")
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
