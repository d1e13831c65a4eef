"""Pieces over RDMA to InfiniStore, with a stand-in for the client in its package and a server that is made up. Nothing here is RDMA."""

from __future__ import annotations

import ctypes
import importlib.machinery
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvtiers.config import CacheConfig
from kvtiers.model.errors import (
    ConfigError,
    RecordCorrupt,
    RecordMissing,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.none import NoCodec
from kvtiers.runtime.remote_plan import remote_store, what_is_missing
from kvtiers.stores.base import RecordStore
from kvtiers.stores.infinistore import rdma_client
from kvtiers.stores.infinistore.rdma import RdmaValues, infinistore_rdma_store
from kvtiers.stores.infinistore.values import InfiniStoreSettings, InfiniStoreValues
from kvtiers.stores.key_values import Value
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.remote_work import begin
from kvtiers.testing.sealed_parts import Damage, make_part
from kvtiers.testing.servers.process import LOOPBACK, free_port
from kvtiers.testing.shared_store_kit import SharedStoreContract

KIB = 1 << 10
PATIENCE_S = 30.0
SHORT_S = 1.0
"""For calls that are not answered."""
OK, MISSING, BROKEN, FULL = 200, 404, 503, 507


class MadeUpServer:
    """Values, the few requests over TCP that kvtiers makes, and how transfers by RDMA go."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.port = free_port()
        self.code = OK
        """What transfers are answered with."""
        self.answers = threading.Event()
        self.answers.set()
        self.closes = threading.Event()
        self.closes.set()
        self.connects = threading.Event()
        self.connects.set()
        self.refused_step = ""
        self.refuses_transfers = False
        self.connections: list[StandInConnection] = []
        self._accepted: list[socket.socket] = []
        self.start()

    def start(self) -> None:
        self._listener = socket.create_server((LOOPBACK, self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def kill(self) -> None:
        """Whoever is connected is never answered."""
        for one in self.connections:
            one.lost = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        while self._accepted:
            with suppress(OSError):  # who has gone
                self._accepted.pop().shutdown(socket.SHUT_RDWR)
        with self.lock:
            self.values.clear()

    def _accept(self) -> None:
        listener = self._listener
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._accepted.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """What has come on a connection is done before anything of another one, as in the real server."""
        asked = bytearray()
        with connection, suppress(OSError):
            while data := connection.recv(1 << 20):
                asked += data
                with self.lock:
                    answers = b"".join(self._answers(asked))
                connection.sendall(answers)

    def _answers(self, asked: bytearray) -> Iterator[bytes]:
        """To the requests that have arrived in full, which are taken away."""
        while len(asked) >= 9:
            _, operation, nbytes = struct.unpack_from("<IBI", asked)
            end = 9 + nbytes
            if len(asked) < end:
                return
            body, puts = bytes(asked[9:end]), False
            if operation == ord("L"):
                puts = body[28] == ord("P")
                end += struct.unpack_from("<i", body, 24)[0]
                if len(asked) < end:
                    return
            yield self._answer(chr(operation), body, bytes(asked[9 + nbytes : end]) if puts else None)
            del asked[:end]

    def _answer(self, operation: str, body: bytes, value: bytes | None) -> bytes:
        if operation == "C":
            return struct.pack("<ii", OK, body.decode() not in self.values)
        if operation == "X":
            return struct.pack(
                "<ii", OK, sum(self.values.pop(name, None) is not None for name in strings(body))
            )
        (name_bytes,) = struct.unpack_from("<I", body, 32)
        name = body[36 : 36 + name_bytes].decode()
        if value is not None:
            self.values[name] = value
            return struct.pack("<i", OK)
        found = self.values.get(name)
        return struct.pack("<i", MISSING) if found is None else struct.pack("<iI", OK, len(found)) + found


def strings(body: bytes) -> list[str]:
    """Of a removal."""
    (count,) = struct.unpack_from("<I", body, 20)
    found = []
    for place in range(24, 24 + 4 * count, 4):
        start = place + struct.unpack_from("<I", body, place)[0]
        (length,) = struct.unpack_from("<I", body, start)
        found.append(body[start + 4 : start + 4 + length].decode())
    return found


class StandInConnection:
    """As `infinistore._infinistore.Connection` of 0.2.35."""

    def __init__(self, server: MadeUpServer) -> None:
        self.server = server
        self.lost = False
        self.closed = threading.Event()
        self.registered: list[tuple[int, int]] = []
        self.config: Any = None
        self.under_way = 0
        self.most_under_way = 0
        server.connections.append(self)

    def init_connection(self, config: Any) -> int:
        self.config = config
        assert self.server.connects.wait(PATIENCE_S)
        return -1 if self.server.refused_step == "init" else 0

    def setup_rdma(self, config: Any) -> int:
        assert config is self.config
        return -1 if self.server.refused_step == "setup" else 0

    def register_mr(self, base: int, nbytes: int) -> int:
        self.registered.append((base, nbytes))
        return -1 if self.server.refused_step == "register" else 0

    def w_rdma_async(
        self, keys: list[str], offsets: list[int], nbytes: int, base: int, answered: Callable[[int], None]
    ) -> int:
        def store() -> int:
            with self.server.lock:
                for key, offset in zip(keys, offsets, strict=True):
                    self.server.values[key] = ctypes.string_at(base + offset, nbytes)
            return OK

        return self._begin(store, offsets, nbytes, base, answered)

    def r_rdma_async(
        self, keys: list[str], offsets: list[int], nbytes: int, base: int, answered: Callable[[int], None]
    ) -> int:
        def load() -> int:
            with self.server.lock:
                found = [self.server.values.get(key) for key in keys]
            for value, offset in zip(found, offsets, strict=True):
                if value is None:
                    return MISSING
                value = value.ljust(nbytes, b"?")  # what lies behind it in the server
                ctypes.memmove(base + offset, value, nbytes)
            return OK

        return self._begin(load, offsets, nbytes, base, answered)

    def close(self) -> None:
        assert self.server.closes.wait(PATIENCE_S)
        self.closed.set()

    def _begin(
        self,
        transfer: Callable[[], int],
        offsets: list[int],
        nbytes: int,
        base: int,
        answered: Callable[[int], None],
    ) -> int:
        ((at, size),) = self.registered
        assert at == base
        assert all(offset >= 0 and offset + nbytes <= size for offset in offsets)
        if self.server.refuses_transfers:
            return -1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)

        def run() -> None:
            self.server.answers.wait(PATIENCE_S)
            if self.lost or self.closed.is_set():
                return
            code = transfer() if self.server.code == OK else self.server.code
            self.under_way -= 1
            answered(code)

        threading.Thread(target=run, daemon=True).start()
        return 0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MadeUpServer]:
    """And the stand-in, installed, on a host with a device that may lock all its memory."""
    server = MadeUpServer()
    wheel: Any = ModuleType("infinistore")
    wheel.__spec__ = importlib.machinery.ModuleSpec("infinistore", None)
    wheel.TYPE_RDMA = "RDMA"
    wheel.ClientConfig = SimpleNamespace
    wheel.InfinityConnection = lambda config: SimpleNamespace(conn=StandInConnection(server), config=config)
    monkeypatch.setitem(sys.modules, "infinistore", wheel)
    port = tmp_path / "devices" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "link_layer").write_text("InfiniBand\n")
    monkeypatch.setattr(rdma_client, "_DEVICES", tmp_path / "devices")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    yield server
    for held in (server.answers, server.closes, server.connects):
        held.set()
    server.kill()


def settings_of(server: MadeUpServer, **other: Any) -> InfiniStoreSettings:
    values = {"timeout_s": PATIENCE_S, "piece_bytes": 256 * KIB, "rdma_device": "mlx5_0", **other}
    return InfiniStoreSettings(f"{LOOPBACK}:{server.port}", **values)


@pytest.fixture
def make(server: MadeUpServer) -> Iterator[Callable[..., RdmaValues]]:
    made: list[RdmaValues] = []

    def make(**other: Any) -> RdmaValues:
        made.append(RdmaValues(settings_of(server, **other)))
        made[-1].open()
        return made[-1]

    yield make
    server.closes.set()
    for one in made:
        one.close()


Make = Callable[..., RdmaValues]


def put(values: InfiniStoreValues, name: str, value: bytes) -> None:
    values.put([Value(name, memoryview(value))])


def read(values: InfiniStoreValues, name: str, nbytes: int) -> bytes:
    out = bytearray(nbytes)
    values.get_into([Value(name, memoryview(out))])
    return bytes(out)


class TestOverTheStandIn(SharedStoreContract):
    listable = False
    exact_usage = False
    server: MadeUpServer

    @pytest.fixture(autouse=True)
    def _server(self, server: MadeUpServer) -> None:
        self.server = server

    def make_store(self, place: Path) -> RecordStore:
        return infinistore_rdma_store(settings_of(self.server), NoCodec())

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        name = name_of(ref)
        with self.server.lock:
            values = self.server.values
            last = (
                name
                if how is Damage.FLIP_HEADER
                else max(one for one in values if one.startswith(f"{name}:"))
            )
            value = bytearray(values[last])
            if how in (Damage.FLIP_HEADER, Damage.FLIP_PAYLOAD, Damage.FLIP_PADDING):
                value[len(value) // 2] ^= 1
                values[last] = bytes(value)
            elif how is Damage.TRUNCATE:
                values[last] = bytes(value[: len(value) // 2])
            elif how is Damage.EMPTY:
                values[name] = b"\0"
            elif how is Damage.REMOVE:
                del values[name]
            else:
                values[name] = values[name_of(make_part(2, 5000).ref)]


def name_of(ref: RecordRef) -> str:
    return f"kv1:{ref.namespace.hex()}:{{{ref.key.hex()}}}:{ref.part}"


# --- what is needed ---------------------------------------------------------------------------------------------------


def config(**section: Any) -> CacheConfig:
    remote = {"enabled": True, "backend": "infinistore", "endpoint": "store:1", "infinistore": section}
    return CacheConfig.from_mapping({"storage": {"remote": remote}}, environ={})


def test_without_the_package_it_is_told_what_to_install(
    server: MadeUpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(rdma_device="mlx5_0").storage.remote
    assert what_is_missing(chosen) is None
    monkeypatch.setitem(sys.modules, "infinistore", None)
    values = RdmaValues(settings_of(server))
    with pytest.raises(StoreUnavailable, match="pip install --no-deps infinistore"):
        values.open()
    told = what_is_missing(chosen)
    assert told is not None
    assert rdma_client.INSTALL in told
    assert what_is_missing(config().storage.remote) is None


@pytest.mark.parametrize(
    ("written", "kind"), [({}, InfiniStoreValues), ({"rdma_device": "mlx5_0"}, RdmaValues)]
)
def test_it_is_taken_only_when_a_device_is_named(written: dict[str, Any], kind: type) -> None:
    store: Any = remote_store(config(**written))
    assert type(store._values) is kind


@pytest.mark.parametrize(
    "wrong", [{"rdma_device": "../mlx5_0"}, {"rdma_port": 0}, {"rdma_port": 256}, {"rdma_connections": 0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        InfiniStoreSettings("store:1", **wrong)


@pytest.mark.parametrize("wrong", [{"rdma_device": "mlx5_7"}, {"rdma_port": 2}])
def test_a_device_that_is_not_there_is_named_with_those_that_are(
    server: MadeUpServer, wrong: dict[str, Any]
) -> None:
    """The client would take another one, or crash."""
    with pytest.raises(StoreUnavailable, match=r"no RDMA device .*devices here: mlx5_0"):
        RdmaValues(settings_of(server, **wrong)).open()
    assert not server.connections


def test_too_little_memory_to_lock_is_told(server: MadeUpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client would abort."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64 << 20, 64 << 20))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(StoreUnavailable, match=r"lock 1024 MiB .* lock 64 MiB: raise `ulimit -l`"):
        RdmaValues(settings_of(server)).open()


@pytest.mark.parametrize(
    ("step", "told"),
    [("init", "reach the server"), ("setup", "through mlx5_0"), ("register", "register memory")],
)
def test_a_connection_that_fails_is_told_and_tried_again(
    server: MadeUpServer, make: Make, step: str, told: str
) -> None:
    values = make()
    server.refused_step = step
    for _ in range(5):
        with pytest.raises(StoreUnavailable, match=told):
            put(values, "a", bytes(8 * KIB))
    with pytest.raises(StoreUnavailable, match=told):
        values.probe()
    assert all(one.closed.is_set() for one in server.connections)
    server.refused_step = ""
    values.probe()
    put(values, "a", bytes(8 * KIB))
    assert values.stats()["rdma_given_up"] == 0


def test_a_host_without_an_ipv4_address_is_told() -> None:
    settings = InfiniStoreSettings("[::1]:1", rdma_device="mlx5_0")
    with pytest.raises(StoreUnavailable, match="no IPv4 address"):
        rdma_client.connect(settings, 0, 0)


def test_the_client_is_told_what_was_configured(server: MadeUpServer, make: Make) -> None:
    make().probe()
    (connection,) = server.connections
    assert vars(connection.config) == {
        "connection_type": "RDMA",
        "host_addr": LOOPBACK,
        "service_port": server.port,
        "dev_name": "mlx5_0",
        "ib_port": 1,
        "link_type": "IB",
        "log_level": "error",
    }


# --- transfers --------------------------------------------------------------------------------------------------------


def test_values_come_back_through_one_registered_buffer(server: MadeUpServer, make: Make) -> None:
    values = make()
    large = {f"name{number}": bytes([number]) * (256 * KIB - number) for number in range(5)}
    values.put([Value(name, memoryview(value)) for name, value in large.items()])
    assert {name: read(values, name, len(value)) for name, value in large.items()} == large
    (connection,) = server.connections
    ((_, nbytes),) = connection.registered
    assert nbytes == 256 * KIB


def test_hosts_with_and_without_rdma_share_values_and_small_ones_need_none(
    server: MadeUpServer, make: Make
) -> None:
    by_tcp = InfiniStoreValues(settings_of(server))
    by_tcp.open()
    values = make()
    put(values, "small", b"s" * 4095)
    assert read(by_tcp, "small", 4095) == b"s" * 4095
    assert not server.connections
    put(values, "large", b"l" * 4096)
    assert read(by_tcp, "large", 4096) == b"l" * 4096
    put(by_tcp, "other", b"o" * 9000)
    assert read(values, "other", 9000) == b"o" * 9000
    assert len(server.connections) == 1
    by_tcp.close()


def test_what_is_missing_and_what_does_not_fit_costs_no_connection(server: MadeUpServer, make: Make) -> None:
    values = make()
    with pytest.raises(RecordMissing):
        read(values, "absent", 8 * KIB)
    server.code = FULL
    with pytest.raises(StoreFull):
        put(values, "a", bytes(8 * KIB))
    server.code = OK
    put(values, "a", b"a" * 8 * KIB)
    assert read(values, "a", 8 * KIB) == b"a" * 8 * KIB
    assert len(server.connections) == 1


def test_any_other_answer_costs_the_connection(server: MadeUpServer, make: Make) -> None:
    values = make()
    server.code = BROKEN
    with pytest.raises(StoreTransient, match="503"):
        put(values, "a", bytes(8 * KIB))
    server.code, server.refuses_transfers = OK, True
    with pytest.raises(StoreTransient, match="-1"):
        put(values, "a", bytes(8 * KIB))
    server.refuses_transfers = False
    put(values, "a", bytes(8 * KIB))
    assert [one.closed.wait(PATIENCE_S) for one in server.connections[:2]] == [True, True]
    assert values.stats()["rdma_given_up"] == 2


def test_existence_and_removal_of_many(make: Make) -> None:
    values = make()
    names = [f"name{number}" for number in range(300)]
    for name in names[::50]:
        put(values, name, bytes(8 * KIB))
    assert values.exists(names) == [number % 50 == 0 for number in range(300)]
    assert values.remove([*names[:51], "absent"]) == 2
    assert values.exists(names[:101:50]) == [False, False, True]
    with pytest.raises(RecordMissing):
        read(values, "name50", 8 * KIB)


def test_manifests_are_swapped_and_removed_as_over_tcp(make: Make) -> None:
    values = make()
    assert values.swap("m", b"one") is None
    assert values.swap("m", b"two") == b"one"
    assert values.get("m") == b"two"
    assert not values.remove_if("m", b"one")
    assert values.remove_if("m", b"two")
    with pytest.raises(RecordMissing):
        values.get("m")


def test_a_connection_has_one_transfer_at_a_time_and_waits_for_one_are_counted(
    server: MadeUpServer, make: Make
) -> None:
    values = make(rdma_connections=2)
    server.answers.clear()
    calls = [begin(put, values, f"name{number}", bytes([number]) * 8 * KIB) for number in range(6)]
    assert wait_until(lambda: sum(one.under_way for one in server.connections) == 2, PATIENCE_S)
    time.sleep(0.05)
    server.answers.set()
    for call in calls:
        call.result(PATIENCE_S)
    assert [one.most_under_way for one in server.connections] == [1, 1]
    stats = values.stats()
    assert stats["connection_waits"] == 4
    assert stats["connection_wait_us"] > 0
    assert all(read(values, f"name{number}", 8 * KIB) == bytes([number]) * 8 * KIB for number in range(6))


# --- what does not answer ---------------------------------------------------------------------------------------------


def test_a_call_that_is_not_answered_ends_by_its_deadline_and_its_buffer_is_nobody_elses(
    server: MadeUpServer, make: Make
) -> None:
    values = make()
    put(values, "late", b"L" * 64 * KIB)
    put(values, "other", b"O" * 64 * KIB)
    server.answers.clear()
    server.closes.clear()
    out = bytearray(b"-" * 64 * KIB)
    began = time.monotonic()
    with values.within_time(SHORT_S), pytest.raises(StoreTransient, match="no answer by RDMA"):
        values.get_into([Value("late", memoryview(out))])
    assert time.monotonic() - began < PATIENCE_S / 2
    assert values.stats()["rdma_given_up"] == 1
    assert values.stats()["rdma_ending"] == 1
    link = next(iter(values._ending))
    link.buffer[:] = bytes(len(link.buffer))
    reading = begin(read, values, "other", 64 * KIB)
    assert wait_until(lambda: len(server.connections) == 2, PATIENCE_S)
    server.answers.set()  # now the late answer comes as well
    assert reading.result(PATIENCE_S) == b"O" * 64 * KIB
    assert wait_until(lambda: bytes(link.buffer[: 64 * KIB]) == b"L" * 64 * KIB, PATIENCE_S)
    assert out == b"-" * 64 * KIB
    first, second = (one.registered[0] for one in server.connections)
    assert first[0] + first[1] <= second[0] or second[0] + second[1] <= first[0]
    server.closes.set()
    assert wait_until(lambda: values.stats()["rdma_ending"] == 0, PATIENCE_S)


def test_connections_that_do_not_end_are_bounded_and_it_heals_when_they_do(
    server: MadeUpServer, make: Make
) -> None:
    values = make(rdma_connections=2)
    server.answers.clear()
    server.closes.clear()
    for _ in range(2):
        with values.within_time(SHORT_S), pytest.raises(StoreTransient, match="no answer"):
            put(values, "a", bytes(8 * KIB))
    server.answers.set()
    for _ in range(2):
        with values.within_time(SHORT_S), pytest.raises(StoreTransient, match=r"2 connections .* do not end"):
            put(values, "a", bytes(8 * KIB))
    assert len(server.connections) == 2
    assert values.stats()["rdma_ending"] == 2
    server.closes.set()
    assert wait_until(lambda: values.stats()["rdma_ending"] == 0, PATIENCE_S)
    put(values, "a", bytes(8 * KIB))


def test_a_connection_that_is_slow_to_come_is_waited_for_again_and_given_up_in_the_end(
    server: MadeUpServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = make()
    server.connects.clear()
    for _ in range(2):
        with values.within_time(SHORT_S), pytest.raises(StoreUnavailable, match="not yet connected"):
            put(values, "a", bytes(8 * KIB))
    assert wait_until(lambda: len(server.connections) == 1, PATIENCE_S)
    (link,) = values._idle
    monkeypatch.setattr(link, "_given_up_at", time.monotonic())
    with values.within_time(SHORT_S), pytest.raises(StoreUnavailable, match="not yet connected"):
        put(values, "a", bytes(8 * KIB))
    assert values.stats()["rdma_ending"] == 1
    server.connects.set()
    assert wait_until(lambda: values.stats()["rdma_ending"] == 0, PATIENCE_S)
    assert server.connections[0].closed.is_set()
    put(values, "a", bytes(8 * KIB))


def test_a_server_that_is_lost_and_comes_back(server: MadeUpServer, make: Make) -> None:
    values = make()
    put(values, "a", b"a" * 8 * KIB)
    server.kill()
    with values.within_time(SHORT_S), pytest.raises(StoreTransient):
        read(values, "a", 8 * KIB)
    with pytest.raises(StoreUnavailable, match="can't be reached"):
        read(values, "a", 8 * KIB)
    server.start()
    with pytest.raises(RecordMissing):
        read(values, "a", 8 * KIB)
    put(values, "a", b"b" * 8 * KIB)
    assert read(values, "a", 8 * KIB) == b"b" * 8 * KIB
    assert server.connections[0].closed.wait(PATIENCE_S)


def test_steps_of_one_call_share_its_deadline(server: MadeUpServer, make: Make) -> None:
    values = make()
    server.answers.clear()
    began = time.monotonic()
    with values.within_time(SHORT_S), pytest.raises(StoreTransient):
        values.put([Value(f"name{number}", memoryview(bytes(8 * KIB))) for number in range(10)])
    assert time.monotonic() - began < PATIENCE_S / 2


def test_a_call_that_close_interrupts_ends_and_what_comes_after_is_refused(
    server: MadeUpServer, make: Make
) -> None:
    values = make()
    server.answers.clear()

    def put_briefly() -> None:
        with values.within_time(3.0):
            put(values, "a", bytes(8 * KIB))

    call = begin(put_briefly)
    assert wait_until(lambda: any(one.under_way for one in server.connections), PATIENCE_S)
    values.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        call.result(PATIENCE_S)
    with pytest.raises(StoreUnavailable, match="closed"):
        put(values, "a", bytes(8 * KIB))
    assert all(one.closed.wait(PATIENCE_S) for one in server.connections)


def test_a_value_of_another_length_is_found_by_the_records_checksum(server: MadeUpServer, make: Make) -> None:
    make()
    store = infinistore_rdma_store(settings_of(server), NoCodec())
    store.open()
    part = make_part(1, 100_000)
    store.write(part)
    with server.lock:
        (piece,) = (one for one in server.values if one.startswith(f"{name_of(part.ref)}:"))
        server.values[piece] = server.values[piece][:5000]
    with pytest.raises(RecordCorrupt):
        store.read_into(part.ref, memoryview(bytearray(len(part.payload))), len(part.payload))
    assert store.exists([part.ref]) == [False]
    store.close()
