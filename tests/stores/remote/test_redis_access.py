"""Getting in: passwords, users, certificates, sentinels; and what an operator is told who has got it wrong."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from kvtiers.model.errors import RecordMissing, StoreError, StoreFull, StoreTransient, StoreUnavailable
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore, SealedPart
from kvtiers.stores.redis import RedisSettings, redis_store
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.remote_kit import comes_back, ends
from kvtiers.testing.sealed_parts import make_part, reads_back
from kvtiers.testing.servers.process import free_port
from kvtiers.testing.servers.relay import Relay
from kvtiers.testing.servers.valkey import ValkeySentinels, ValkeyServer
from kvtiers.testing.valkey_kit import MIB, PASSWORD, settings_for

PATIENCE_S = 30.0
WRONG = "not the password"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path_factory.mktemp("kvt") / "v", password=PASSWORD)
    server.start()
    yield server
    server.stop()


@contextmanager
def opened(settings: RedisSettings) -> Iterator[RecordStore]:
    store = redis_store(settings, codec_for("none"))
    store.open()
    yield store
    store.close()


def problem_of(settings: RedisSettings, kind: type[StoreError] = StoreUnavailable) -> str:
    """What is said when this does not work: one line, without a secret."""
    message = ""
    with opened(settings) as store:
        for call in (
            store.probe,
            lambda: store.exists([make_part(1, 100).ref]),
            lambda: store.write(make_part(1, 100)),
        ):
            with pytest.raises(kind) as error:
                ends(call)
            message = str(error.value)
    assert "\n" not in message
    for secret in (PASSWORD, WRONG, repr(PASSWORD)[1:-1]):
        assert secret not in message
        assert secret not in repr(settings)
    return message


def works_with(settings: RedisSettings) -> bool:
    part = make_part(1, 3 * MIB)
    with opened(settings) as store:
        store.probe()
        store.write(part)
        return reads_back(store, part) and store.exists([part.ref]) == [True]


# --- passwords and users ----------------------------------------------------------------------------------------------


def test_a_wrong_password_is_said_to_be_one(server: ValkeyServer) -> None:
    message = problem_of(settings_for(server.address, password=WRONG))
    assert "KVTIERS_REMOTE_PASSWORD" in message
    assert str(server.port) in message


def test_a_missing_password_is_said_to_be_missing(server: ValkeyServer) -> None:
    assert "KVTIERS_REMOTE_PASSWORD" in problem_of(settings_for(server.address))


def test_a_user_who_may_do_what_the_store_does_gets_in_and_others_do_not(server: ValkeyServer) -> None:
    commands = ["+ping", "+info", "+get", "+set", "+exists", "+unlink", "+del", "+eval", "+select"]
    server.execute("ACL", "SETUSER", "kv", "on", f">{PASSWORD}", "~kv1:*", *commands)
    assert works_with(settings_for(server.address, username="kv", password=PASSWORD))
    assert works_with(settings_for(server.address, username="default", password=PASSWORD))
    message = problem_of(settings_for(server.address, username="nobody", password=PASSWORD))
    assert "KVTIERS_REMOTE_USERNAME" in message


def test_a_user_without_a_permission_is_told_which(server: ValkeyServer) -> None:
    server.execute("ACL", "SETUSER", "reader", "on", f">{PASSWORD}", "~kv1:*", "+ping", "+get", "+exists")
    with opened(settings_for(server.address, username="reader", password=PASSWORD)) as store:
        store.probe()
        with pytest.raises(RecordMissing):
            reads_back(store, make_part(9, 100))
        with pytest.raises(StoreUnavailable, match="'set'"):
            store.write(make_part(9, 100))


def test_a_database_keeps_its_records_to_itself(server: ValkeyServer) -> None:
    host, port = server.address
    part = make_part(5, 5000)
    with opened(
        settings_for(server.address, endpoint=f"redis://{host}:{port}/3", password=PASSWORD)
    ) as third:
        third.write(part)
        with opened(settings_for(server.address, password=PASSWORD)) as first:
            assert first.exists([part.ref]) == [False]
        assert third.exists([part.ref]) == [True]
    wrong = settings_for(server.address, endpoint=f"redis://{host}:{port}/9999", password=PASSWORD)
    assert "has no database 9999" in problem_of(wrong)


def test_a_unix_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no.sock"
    message = problem_of(settings_for(("", 0), endpoint=f"unix://{path}"))
    assert str(path) in message


# --- TLS --------------------------------------------------------------------------------------------------------------


class Certificates:
    """An authority, the certificate of a server on the loopback, and one of a client."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))
        other = folder / "other-ca.pem"
        trustme.CA().cert_pem.write_to_path(str(other))
        self.other_ca = other
        client = self.authority.issue_cert("client@example.org")
        self.client = folder / "client.pem"
        self.client_key = folder / "client-key.pem"
        client.cert_chain_pems[0].write_to_path(str(self.client))
        client.private_key_pem.write_to_path(str(self.client_key))

    def server(self, host: str, *, wants_client: bool = False) -> ssl.SSLContext:
        """What a server of that name presents."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(host).configure_cert(context)
        if wants_client:
            context.verify_mode = ssl.CERT_REQUIRED
            self.authority.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls(server: ValkeyServer) -> Iterator[Callable[[ssl.SSLContext], Callable[..., RedisSettings]]]:
    """Puts TLS before the server (the package's Valkey is built without); gives what makes settings for it."""
    relays: list[Relay] = []

    def before(context: ssl.SSLContext) -> Callable[..., RedisSettings]:
        relays.append(Relay(server.address, tls=context))
        host, port = relays[-1].address

        def settings(**changes: Any) -> RedisSettings:
            return settings_for(("", 0), endpoint=f"rediss://{host}:{port}", password=PASSWORD, **changes)

        return settings

    yield before
    for relay in relays:
        relay.close()


Tls = Callable[[ssl.SSLContext], Callable[..., RedisSettings]]


def test_tls_with_the_right_authority_works(tls: Tls, certificates: Certificates) -> None:
    settings = tls(certificates.server("127.0.0.1"))
    assert works_with(settings(tls_ca_file=str(certificates.ca)))


def test_a_certificate_of_an_unknown_authority_is_refused(tls: Tls, certificates: Certificates) -> None:
    settings = tls(certificates.server("127.0.0.1"))
    for ca in ("", str(certificates.other_ca)):
        message = problem_of(settings(tls_ca_file=ca))
        assert "certificate" in message
        assert "tls_ca_file" in message


def test_a_certificate_of_another_host_is_refused_unless_that_is_not_checked(
    tls: Tls, certificates: Certificates
) -> None:
    settings = tls(certificates.server("another.example.org"))
    assert "IP address mismatch" in problem_of(settings(tls_ca_file=str(certificates.ca)))
    assert works_with(settings(tls_ca_file=str(certificates.ca), tls_check_hostname=False))


def test_a_server_that_wants_a_certificate_of_ours_gets_it(tls: Tls, certificates: Certificates) -> None:
    settings = tls(certificates.server("127.0.0.1", wants_client=True))
    ours = {"tls_cert_file": str(certificates.client), "tls_key_file": str(certificates.client_key)}
    assert works_with(settings(tls_ca_file=str(certificates.ca), **ours))
    problem_of(settings(tls_ca_file=str(certificates.ca)), kind=StoreError)


def test_tls_to_a_plain_port_is_said_to_be_that(server: ValkeyServer, certificates: Certificates) -> None:
    host, port = server.address
    settings = settings_for(
        ("", 0), 0.5, endpoint=f"rediss://{host}:{port}", password=PASSWORD, tls_ca_file=str(certificates.ca)
    )
    assert "is it a TLS port?" in problem_of(settings, kind=StoreTransient)


def test_a_missing_file_of_tls_is_said_at_open(tmp_path: Path) -> None:
    settings = settings_for(("", 0), endpoint="rediss://127.0.0.1:1", tls_ca_file=str(tmp_path / "none.pem"))
    with pytest.raises(StoreUnavailable, match="tls_ca_file"):
        redis_store(settings, codec_for("none")).open()


# --- sentinels --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeySentinels]:
    sentinels = ValkeySentinels(tmp_path_factory.mktemp("kvt") / "s", password=PASSWORD)
    sentinels.start()
    yield sentinels
    sentinels.stop()


def sentinel_endpoint(sentinels: ValkeySentinels, name: str) -> str:
    hosts = ",".join(f"{host}:{port}" for host, port in (one.address for one in sentinels.sentinels))
    return f"redis-sentinel://{hosts}/{name}"


def test_an_unknown_master_is_named(sentinels: ValkeySentinels) -> None:
    endpoint = sentinel_endpoint(sentinels, "nobody")
    assert "'nobody'" in problem_of(settings_for(("", 0), endpoint=endpoint, password=PASSWORD))


def test_a_password_that_the_sentinels_refuse_is_said_to_be_theirs(sentinels: ValkeySentinels) -> None:
    endpoint = sentinel_endpoint(sentinels, sentinels.name)
    settings = settings_for(("", 0), endpoint=endpoint, password=PASSWORD, sentinel_password=WRONG)
    assert "KVTIERS_REMOTE_SENTINEL_PASSWORD" in problem_of(settings)


def test_no_sentinel_at_all_is_said(sentinels: ValkeySentinels) -> None:
    endpoint = f"redis-sentinel://127.0.0.1:{free_port()}/mymaster"
    assert "no sentinel" in problem_of(settings_for(("", 0), endpoint=endpoint))


def in_the_end(call: Callable[[], object]) -> bool:
    """Whether it goes well at some time: sentinels need a moment to agree."""

    def goes_well() -> bool:
        try:
            return bool(ends(call))
        except (StoreTransient, StoreUnavailable):
            return False

    return wait_until(goes_well, PATIENCE_S)


def test_a_master_that_dies_is_replaced_and_one_sentinel_may_be_gone(sentinels: ValkeySentinels) -> None:
    endpoint = sentinel_endpoint(sentinels, sentinels.name)
    first, second = make_part(1, 3 * MIB), make_part(2, 3 * MIB)
    with opened(settings_for(("", 0), endpoint=endpoint, password=PASSWORD)) as store:
        store.write(first)
        assert wait_until(lambda: len(sentinels.replica.execute("KEYS", "*")) == 4, PATIENCE_S)
        sentinels.master.kill()
        assert in_the_end(lambda: store.write(second))
        assert reads_back(store, first)
        assert reads_back(store, second)
        sentinels.sentinels[0].process.kill()
        with opened(settings_for(("", 0), endpoint=endpoint, password=PASSWORD)) as another:
            assert in_the_end(lambda: reads_back(another, first))


# --- a server that forgets, or is full --------------------------------------------------------------------------------


def test_a_server_that_evicts_gives_misses_and_right_bytes(tmp_path_factory: pytest.TempPathFactory) -> None:
    options = {"maxmemory": str(24 * MIB), "maxmemory-policy": "allkeys-lru"}
    server = ValkeyServer(tmp_path_factory.mktemp("kvt") / "v", options=options)
    server.start()
    try:
        with opened(settings_for(server.address)) as store:
            parts = [make_part(number, 3 * MIB + number) for number in range(16)]
            for part in parts:
                store.write(part)
            found = [comes_back(store, part.ref, bytes(part.payload)) for part in parts]
            assert 0 < sum(found) < 16
            offered = store.exists([part.ref for part in parts])
            assert offered == found, "whatever has lost a piece is not offered again"
    finally:
        server.stop()


def test_a_server_that_does_not_evict_refuses_and_keeps_no_half_records(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    options = {"maxmemory": str(24 * MIB), "maxmemory-policy": "noeviction"}
    server = ValkeyServer(tmp_path_factory.mktemp("kvt") / "v", options=options)
    server.start()
    try:
        with opened(settings_for(server.address)) as store:
            written: list[SealedPart] = []

            def fill() -> None:
                for number in range(16):
                    part = make_part(number, 3 * MIB)
                    store.write(part)
                    written.append(part)

            with pytest.raises(StoreFull, match="OOM"):
                fill()
            assert len(written) > 3
            assert all(reads_back(store, part) for part in written)
            assert len(server.execute("KEYS", "*")) == 4 * len(written)
    finally:
        server.stop()


def test_the_client_is_asked_for_by_name_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(StoreUnavailable, match=r"pip install 'kvtiers\[redis\]'"):
        redis_store(settings_for(("127.0.0.1", 1)), codec_for("none")).open()


def test_never_more_connections_than_allowed(server: ValkeyServer) -> None:
    def clients() -> int:
        return len(bytes(server.execute("CLIENT", "LIST")).splitlines())

    before = clients()
    with opened(settings_for(server.address, password=PASSWORD, connection_pool_size=2)) as store:
        parts = [make_part(number, 400_000) for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(store.write, parts))
            assert all(pool.map(lambda part: reads_back(store, part), parts))
        assert clients() - before == 2
        stats = store.stats()
        assert stats["connections_open"] <= 2
        assert stats["connections_made"] == 2
        assert stats["connection_waits"] > 0


def test_a_server_that_was_restarted_is_noticed_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = ValkeyServer(tmp_path_factory.mktemp("kvt") / "v", password=PASSWORD)
    server.start()
    try:
        with opened(settings_for(server.address, password=PASSWORD)) as store:
            store.probe()
            for restarts in (1, 2):
                server.kill()
                server.start()
                for _ in range(3):
                    store.probe()
                    assert store.restarts() == restarts
            server.execute("CLIENT", "KILL", "TYPE", "normal")  # only the connections are gone
            store.probe()
            assert store.stats()["connections_made"] > 3
            assert store.restarts() == 2
    finally:
        server.stop()
