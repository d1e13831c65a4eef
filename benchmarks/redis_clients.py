"""What a client of Redis costs: redis-py as it comes, redis-py tuned, and our wire, on values of 1 to 8 MiB; and pieces of a record.

python benchmarks/redis_clients.py [--rounds 9]

Interleaved rounds on one Valkey on the loopback; medians. CPU seconds are the calling thread's. The bytes end in the caller's memory.
redis-py uses hiredis where that is installed: as it comes it packs and parses with it, tuned it only parses.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from redis._parsers import Encoder
from redis.connection import Connection, ConnectionPool, PythonRespSerializer

from kvtiers.records.codecs.none import NoCodec
from kvtiers.stores.key_values import Value
from kvtiers.stores.redis import RedisSettings, RedisValues, redis_store
from kvtiers.testing.sealed_parts import make_part, slot
from kvtiers.testing.servers.valkey import ValkeyServer

MIB = 1 << 20
CALLS = 8


def measured(call: Callable[[], object], nbytes: int) -> tuple[float, float]:
    """GB/s and CPU seconds a GB of some calls."""
    began, cpu = time.perf_counter(), time.thread_time()
    for _ in range(CALLS):
        call()
    moved = CALLS * nbytes / 1e9
    return moved / (time.perf_counter() - began), (time.thread_time() - cpu) / moved


def compare(title: str, calls: dict[str, Callable[[], object]], nbytes: int, rounds: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(measured(call, nbytes))
    print(f"{title}, {nbytes / MIB:.4g} MiB")
    for name, results in found.items():
        speed, cpu = (statistics.median(column) for column in zip(*results, strict=True))
        print(f"  {name:36s} {speed:5.2f} GB/s {cpu:5.2f} CPU s/GB")


def bare(out: memoryview) -> Callable[[], object]:
    """A socket whose peer sends as many bytes for each byte it gets."""
    listener = socket.create_server(("127.0.0.1", 0))
    data = bytes(len(out))

    def serve() -> None:
        peer, _ = listener.accept()
        while peer.recv(1):
            peer.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    ours = socket.create_connection(listener.getsockname())

    def call() -> None:
        ours.sendall(b"x")
        done = 0
        while done < len(out):
            done += ours.recv_into(out[done:])

    return call


def client(port: int, **options: Any) -> redis.Redis:
    return redis.Redis(connection_pool=ConnectionPool(Connection, port=port, **options))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        server = ValkeyServer(Path(folder) / "valkey")
        server.start()
        endpoint = f"127.0.0.1:{server.port}"
        as_it_comes = client(server.port)
        packer = PythonRespSerializer(6000, Encoder("utf-8", "strict", False).encode)  # type: ignore[no-untyped-call]
        tuned = client(server.port, command_packer=packer, socket_read_size=MIB, protocol=2)
        values = RedisValues(RedisSettings(endpoint, timeout_s=30))
        values.open()
        for nbytes in (MIB, 4 * MIB, 8 * MIB):
            source, out = slot(nbytes), slot(nbytes)
            source[:] = os.urandom(nbytes)

            def copied(one: redis.Redis, out: memoryview = out) -> None:
                out[:] = one.get("k")  # type: ignore[assignment]

            put, got = [Value("k", source)], [Value("k", out)]
            compare(
                "SET",
                {
                    "redis-py as it comes": lambda source=source: as_it_comes.set("k", source),  # type: ignore[misc]
                    "redis-py tuned": lambda source=source: tuned.set("k", source),  # type: ignore[misc]
                    "our wire": lambda put=put: values.put(put),  # type: ignore[misc]
                },
                nbytes,
                rounds,
            )
            compare(
                "GET into the caller's memory",
                {
                    "redis-py as it comes, and a copy": lambda copied=copied: copied(as_it_comes),  # type: ignore[misc]
                    "redis-py tuned, and a copy": lambda copied=copied: copied(tuned),  # type: ignore[misc]
                    "our wire": lambda got=got: values.get_into(got),  # type: ignore[misc]
                    "a bare socket": bare(out),
                },
                nbytes,
                rounds,
            )
        part, out = make_part(1, 32 * MIB), slot(32 * MIB)
        stores = {}
        for piece in (1, 2, 4, 8, 32):
            stores[piece] = redis_store(
                RedisSettings(endpoint, timeout_s=30, piece_bytes=piece * MIB), NoCodec()
            )
            stores[piece].open()

        def written(store: Any) -> Callable[[], object]:
            return lambda: store.write(part)

        def read(store: Any) -> Callable[[], object]:
            return lambda: store.read_into(part.ref, out, 32 * MIB)

        compare(
            "a record written",
            {f"pieces of {n} MiB": written(one) for n, one in stores.items()},
            32 * MIB,
            rounds,
        )
        for piece, store in stores.items():
            store.write(part)
            compare(f"a record read, pieces of {piece} MiB", {"read_into": read(store)}, 32 * MIB, rounds)
        server.stop()


if __name__ == "__main__":
    main()
