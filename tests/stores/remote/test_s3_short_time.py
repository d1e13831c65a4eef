"""A call of the object store that has less time than the client's time-out: it ends in time, over the connections there are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvtiers.model.errors import StoreTransient
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import StoredRecord
from kvtiers.stores.s3 import S3Settings, S3Store
from kvtiers.testing.sealed_parts import make_part, reads_back, slot

POOL = 4
TIMEOUT_S = 30.0
SHORT_S = 0.5
NBYTES = 8 << 20
_CHUNK = 1 << 20


class Service(ThreadingHTTPServer):
    """Objects in a dictionary. `stalls`: where it stops answering."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.objects: dict[str, bytes] = {}
        self.stalls = ""
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.open = self.most_open = self.made = 0

    def serve_until_closed(self) -> None:
        self.serve_forever(poll_interval=0.05)

    def opened(self, by: int) -> None:
        with self.lock:
            self.open += by
            self.made += by > 0
            self.most_open = max(self.most_open, self.open)

    def stall(self, where: str) -> None:
        if self.stalls == where:
            self.stop.wait(60)


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def setup(self) -> None:
        self.server.opened(1)
        super().setup()

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.server.opened(-1)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            pass  # the client has hung up

    def answer(
        self, status: int, body: bytes, *, with_body: bool = True, within: tuple[int, int] | None = None
    ) -> None:
        self.send_response(status)
        if within is not None:
            start, stop = within
            self.send_header("content-range", f"bytes {start}-{stop - 1}/{len(body)}")
            body = body[start:stop]
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", '"tag"')
        self.send_header("last-modified", "Sun, 29 Nov 2026 14:00:00 GMT")
        self.end_headers()
        if with_body:
            self.wfile.write(body[:_CHUNK])
            self.server.stall("body")
            self.wfile.write(body[_CHUNK:])

    def look(self, *, with_body: bool) -> None:
        self.server.stall("request")
        time.sleep(0.05)
        found = self.server.objects.get(self.path)
        if found is None:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>", with_body=with_body)
        elif self.headers["range"]:
            first, last = self.headers["range"].removeprefix("bytes=").split("-")
            self.answer(206, found, within=(int(first), int(last) + 1))
        else:
            self.answer(200, found, with_body=with_body)

    def do_GET(self) -> None:
        self.look(with_body=True)

    def do_HEAD(self) -> None:
        self.look(with_body=False)

    def do_PUT(self) -> None:
        self.server.stall("request")
        self.server.objects[self.path] = self.rfile.read(int(self.headers["content-length"]))
        self.answer(200, b"")

    def do_DELETE(self) -> None:
        self.server.objects.pop(self.path, None)
        self.answer(204, b"")

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as service:
        threading.Thread(target=service.serve_until_closed, daemon=True).start()
        yield service
        service.stop.set()
        service.shutdown()


@pytest.fixture
def store(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "kvtiers-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "kvtiers-test")
    settings = S3Settings(
        "s3://bucket",
        endpoint_url=f"http://127.0.0.1:{service.server_port}",
        timeout_s=TIMEOUT_S,
        connection_pool_size=POOL,
    )
    store = S3Store(settings, codec_for("none"))
    store.open()
    yield store
    store.close()


@pytest.mark.parametrize("nbytes", [100, NBYTES - 17])
def test_a_record_is_the_same_in_a_short_time(store: S3Store, nbytes: int) -> None:
    part = make_part(1, nbytes)
    with store.within_time(TIMEOUT_S / 2):
        store.write(part)
        assert reads_back(store, part)
    assert reads_back(store, part)
    with store.within_time(TIMEOUT_S / 2):
        read = store.read_into(part.ref, slot(nbytes), nbytes)
        assert isinstance(read, StoredRecord)
        assert store.discard(read)
        assert store.exists([part.ref]) == [False]
        store.probe()


def test_calls_of_any_time_share_the_connections(store: S3Store, service: Service) -> None:
    def probe(seconds: float) -> None:
        with store.within_time(seconds):
            store.probe()

    with ThreadPoolExecutor(POOL) as pool:
        for share in (1, 2, 3, 9, 1):
            list(pool.map(probe, [TIMEOUT_S / share] * POOL))
            time.sleep(0.2)  # the client takes a connection back a moment after its answer
    assert service.most_open <= POOL


@pytest.mark.parametrize(
    ("stalls", "call"),
    [
        ("request", lambda store, part: store.write(part)),
        ("request", lambda store, part: store.probe()),
        ("request", reads_back),
        ("body", reads_back),
    ],
)
def test_a_short_call_ends_in_time(
    store: S3Store, service: Service, stalls: str, call: Callable[[S3Store, object], object]
) -> None:
    part = make_part(1, NBYTES)
    store.write(part)
    service.stalls = stalls
    began = time.monotonic()
    with pytest.raises(Exception) as caught, store.within_time(SHORT_S):
        call(store, part)
    assert isinstance(caught.value, StoreTransient) or "did not answer" in str(caught.value)
    assert SHORT_S * 0.8 < time.monotonic() - began < TIMEOUT_S / 3
    service.stalls = ""
    service.stop.set()
    store.write(part)
    assert reads_back(store, part)


def test_no_request_is_made_when_the_time_is_over(store: S3Store, service: Service) -> None:
    made = service.made
    with store.within_time(0.0), pytest.raises(StoreTransient):
        store.write(make_part(1, 100))
    assert not service.objects
    assert service.made == made
