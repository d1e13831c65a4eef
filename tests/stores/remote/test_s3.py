"""The object store passes the kits against a real server (SeaweedFS), and tells apart what can be wrong with it."""

from __future__ import annotations

import logging
import ssl
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import obstore
import pytest
import trustme

from kvtiers.model.errors import (
    RecordInvalid,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore
from kvtiers.stores.disk.names import record_name
from kvtiers.stores.s3 import S3Settings, S3Store
from kvtiers.testing.disk_damage import damage_file
from kvtiers.testing.remote_kit import RemoteStoreContract
from kvtiers.testing.sealed_parts import Damage, make_part, reads_back, slot
from kvtiers.testing.servers.relay import Relay
from kvtiers.testing.servers.seaweedfs import ACCESS_KEY, SECRET_KEY, SeaweedServer
from kvtiers.testing.store_kit import RecordStoreContract

PREFIX = "some/prefix"


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


class TestS3(RemoteStoreContract):
    timeout_s = 2.0
    patience_s = 60.0
    keeps_values = True
    cannot_fill = "SeaweedFS takes all of its disk; what a full service answers is in test_answers_that_no_test_can_provoke"
    cannot_evict = "a record is one object: it is there whole or not at all"

    @classmethod
    def start_engine(cls, folder: Path) -> SeaweedServer:
        server = SeaweedServer(folder)
        server.start()
        return server

    def make_store_at(self, address: tuple[str, int], timeout_s: float) -> RecordStore:
        return S3Store(settings_at(address, timeout_s=timeout_s), codec_for("none"))

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        assert isinstance(self.engine, SeaweedServer)
        damage_object(self.engine.client(), ref, how)


def settings_at(address: tuple[str, int], scheme: str = "http", **settings: object) -> S3Settings:
    host, port = address
    values = {
        "endpoint": f"s3://kvtiers/{PREFIX}",
        "endpoint_url": f"{scheme}://{host}:{port}",
        "timeout_s": 5.0,
        "connection_pool_size": 16,
        **settings,
    }
    return S3Settings(**values)  # type: ignore[arg-type]


def object_name(ref: RecordRef) -> str:
    return f"{PREFIX}/{record_name(ref)}"


def damage_object(client: obstore.store.S3Store, ref: RecordRef, how: Damage) -> None:
    """Through a file, as the bytes are a disk record's."""
    name = object_name(ref)
    if how is Damage.REMOVE:
        obstore.delete(client, name)
        return
    with tempfile.TemporaryDirectory() as folder:
        file, other = Path(folder, "record"), Path(folder, "other")
        file.write_bytes(obstore.get(client, name).bytes())
        for found in obstore.list(client, f"{PREFIX}/{ref.namespace.hex()}").collect():
            if found["path"] != name:
                other.write_bytes(obstore.get(client, found["path"]).bytes())
        damage_file(file, how, other if other.exists() else None)
        obstore.put(client, name, file.read_bytes(), use_multipart=False)


# --- one server for the rest ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    server = SeaweedServer(tmp_path_factory.mktemp("kvt") / "weed")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(server_of_module: SeaweedServer) -> SeaweedServer:
    server_of_module.start()
    server_of_module.clear()
    return server_of_module


class TestS3Compressed(RecordStoreContract):
    """What a server can suffer does not depend on the codec: the ordinary contract is enough."""

    listable = False
    exact_usage = False

    @pytest.fixture(autouse=True)
    def _server(self, server: SeaweedServer) -> None:
        self.server = server

    def make_store(self, place: Path) -> RecordStore:
        return S3Store(settings_at(self.server.address), codec_for("zstd"))

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        damage_object(self.server.client(), ref, how)


def opened(settings: S3Settings, codec: str = "none") -> S3Store:
    store = S3Store(settings, codec_for(codec))
    store.open()
    return store


def every_call_raises(store: S3Store, kind: type[Exception], match: str) -> None:
    part = make_part(1, 5000)
    for call in (lambda: store.write(part), lambda: reads_back(store, part), store.probe):
        with pytest.raises(kind, match=match) as error:
            call()
        assert "\n" not in str(error.value)
        assert "kvtiers-test" not in str(error.value)
        assert error.value.__cause__ is None or "kvtiers-test" not in repr(error.value.__cause__)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_wrong_key_is_told_once_and_clearly(
    server: SeaweedServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "kvtiers-test-wrong")
    store = opened(settings_at(server.address))
    every_call_raises(store, StoreUnavailable, "refuses us .*the key is wrong")
    with pytest.raises(StoreUnavailable, match="refuses us"):
        store.exists([make_part(1, 100).ref])
    with pytest.raises(StoreUnavailable, match="refuses us"):
        store.delete(make_part(1, 100).ref)


def test_a_bucket_that_is_not_there_is_told(server: SeaweedServer) -> None:
    store = opened(settings_at(server.address, endpoint="s3://no-such-bucket/x"))
    every_call_raises(store, StoreUnavailable, "no such bucket")
    with pytest.raises(StoreUnavailable, match="no such bucket"):
        store.exists([make_part(1, 100).ref])


def test_without_credentials_it_says_which_and_asks_nobody(
    server: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreUnavailable, match="set AWS_ACCESS_KEY_ID"):
        opened(settings_at(server.address))


def test_credentials_may_be_in_a_file(
    server: SeaweedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text(
        f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
        "[other]\naws_access_key_id = kvtiers-test-other\naws_secret_access_key = kvtiers-test-100%\n"
    )
    file.chmod(0o600)
    settings, part = settings_at(server.address, credentials_file=str(file)), make_part(1, 5000)
    store = opened(settings)
    store.write(part)
    assert reads_back(store, part)
    assert store.exists([part.ref]) == [True]
    monkeypatch.setenv("AWS_PROFILE", "other")
    every_call_raises(opened(settings), StoreUnavailable, "refuses us")


@pytest.mark.parametrize(
    "content", [None, "", "kvtiers-test-secret", "[default]\naws_access_key_id = x\n", "[x"]
)
def test_a_credentials_file_that_is_wrong_is_told_without_its_content(
    tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "credentials"
    if content is not None:
        file.write_text(content)
        file.chmod(0o600)
    with pytest.raises(StoreUnavailable, match="credentials_file") as error:
        opened(settings_at(("127.0.0.1", 9), credentials_file=str(file)))
    assert "kvtiers-test" not in str(error.value)
    assert error.value.__cause__ is None


@pytest.mark.parametrize("endpoint", ["s3://bucket", "gs://bucket"])
def test_a_credentials_file_that_others_can_read_is_refused(tmp_path: Path, endpoint: str) -> None:
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = x\naws_secret_access_key = kvtiers-test-secret\n")
    file.chmod(0o640)
    with pytest.raises(StoreUnavailable, match="chmod 600") as error:
        opened(S3Settings(endpoint, credentials_file=str(file)))
    assert "kvtiers-test" not in str(error.value)


def test_no_credential_is_shown_or_logged(server: SeaweedServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store, part = opened(settings_at(server.address)), make_part(1, 5000)
    store.write(part)
    assert reads_back(store, part)
    for shown in (repr(store), repr(vars(store)), str(store.settings), caplog.text):
        assert SECRET_KEY not in shown
        assert ACCESS_KEY not in shown


def test_tls_is_checked_and_its_authority_can_be_given(server: SeaweedServer, tmp_path: Path) -> None:
    authority, part = trustme.CA(), make_part(1, 5000)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    with Relay(server.address, tls=context) as relay:
        trusting = opened(settings_at(relay.address, "https", ca_file=str(ca_file)))
        trusting.write(part)
        assert reads_back(trusting, part)
        every_call_raises(
            opened(settings_at(relay.address, "https")), StoreUnavailable, "certificate is not trusted"
        )
        every_call_raises(
            opened(settings_at(relay.address, "http")), StoreUnavailable, "http or https|connection|answer"
        )


class NothingHere(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        return


def test_what_is_no_object_store_is_told() -> None:
    with HTTPServer(("127.0.0.1", 0), NothingHere) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        store = opened(settings_at(("127.0.0.1", other.server_port)))
        with pytest.raises(StoreUnavailable, match="is no object store"):
            store.probe()
        other.shutdown()


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_an_object_is_the_record_as_on_a_disk(server: SeaweedServer, codec: str) -> None:
    store, part = opened(settings_at(server.address), codec), make_part(1, 3 * (1 << 20) + 17)
    stored = store.write(part)
    meta = obstore.head(server.client(), object_name(part.ref))
    assert meta["size"] == stored
    assert stored % PAGE_BYTES == 0
    assert "-" not in (meta["e_tag"] or "")  # one PUT, not a multipart upload
    assert reads_back(store, part)


def test_some_hundred_names_are_answered_in_order(server: SeaweedServer) -> None:
    store = opened(settings_at(server.address))
    parts = [make_part(number, 100) for number in range(300)]
    for part in parts[::7]:
        store.write(part)
    assert store.exists([part.ref for part in parts]) == [number % 7 == 0 for number in range(300)]
    assert store.stats()["connection_waits"] == 0


def test_a_damaged_object_that_was_written_anew_is_not_removed(
    server: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, writer, part = (
        opened(settings_at(server.address)),
        opened(settings_at(server.address)),
        make_part(1, 5000),
    )
    store.write(part)
    damage_object(server.client(), part.ref, Damage.FLIP_PAYLOAD)
    remove, healed = store._remove_if_still, []

    def late(ref: RecordRef, name: str, e_tag: str | None) -> None:
        healed.append(writer.write(part))
        remove(ref, name, e_tag)

    monkeypatch.setattr(store, "_remove_if_still", late)
    with pytest.raises(RecordInvalid):
        reads_back(store, part)
    assert healed
    assert reads_back(store, part)


def test_a_connection_that_breaks_in_mid_body_is_transient(server: SeaweedServer) -> None:
    part = make_part(1, 4 << 20)
    opened(settings_at(server.address)).write(part)
    with Relay(server.address) as relay:
        store = opened(settings_at(relay.address))
        relay.limit(4 << 20)
        out, failed = slot(4 << 20), []

        def read() -> None:
            try:
                store.read_into(part.ref, out, 4 << 20)
            except StoreTransient as error:
                failed.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        reader.join(0.3)
        relay.close()
        reader.join(30)
        assert not reader.is_alive()
        assert failed
