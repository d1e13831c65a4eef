"""What an endpoint and the other settings say, and how names find their slot."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtiers.model.errors import ConfigError
from kvtiers.stores.redis import RedisSettings, remote_credentials
from kvtiers.stores.redis.routes import slot_of
from kvtiers.stores.redis.settings import Address, Endpoint, Topology, read_endpoint

SERVER, SENTINEL, CLUSTER = Topology.SERVER, Topology.SENTINEL, Topology.CLUSTER


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cache.example.org:7000", Endpoint(SERVER, (Address("cache.example.org", 7000),))),
        ("cache", Endpoint(SERVER, (Address("cache", 6379),))),
        ("redis://10.0.0.1:7000/", Endpoint(SERVER, (Address("10.0.0.1", 7000),))),
        ("redis://10.0.0.1:7000/5", Endpoint(SERVER, (Address("10.0.0.1", 7000),), database=5)),
        ("rediss://cache:1", Endpoint(SERVER, (Address("cache", 1),), tls=True)),
        ("[fd00::1]:7000", Endpoint(SERVER, (Address("fd00::1", 7000),))),
        ("unix:///run/valkey.sock", Endpoint(SERVER, (Address("/run/valkey.sock", 0),))),
        ("redis-cluster://a:1,b:2", Endpoint(CLUSTER, (Address("a", 1), Address("b", 2)))),
        ("rediss-cluster://a", Endpoint(CLUSTER, (Address("a", 6379),), tls=True)),
        ("redis-sentinel://a,b:2/main", Endpoint(SENTINEL, (Address("a", 26_379), Address("b", 2)), master="main")),
        ("redis-sentinel://a/main/4", Endpoint(SENTINEL, (Address("a", 26_379),), database=4, master="main")),
    ],
)  # fmt: skip
def test_every_form_of_an_endpoint_is_read(text: str, expected: Endpoint) -> None:
    assert read_endpoint(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "redis://", "http://cache:1", "cache:port", "cache:0", "cache:65536", "a:1,b:2", "redis://a/x", "redis://a/1/2", "redis-cluster://a/1",
        "redis-sentinel://a", "unix://relative", "redis-ring://a", "redis://a?db=1", "redis-cluster://a,", "redis://[::1:1",
    ],
)  # fmt: skip
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"storage\.remote\.endpoint"):
        RedisSettings(endpoint=text)


@pytest.mark.parametrize(
    "text", ["redis://user:secret@cache:1", ":secret@cache", "redis-cluster://secret@a:1,b:2"]
)
def test_credentials_in_an_endpoint_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError, match="KVTIERS_REMOTE_PASSWORD") as error:
        RedisSettings(endpoint=text)
    assert "secret" not in str(error.value)


def test_settings_never_show_a_password() -> None:
    settings = RedisSettings(endpoint="a:1", username="me", password="secret", sentinel_password="hidden")
    assert not any(word in repr(settings) for word in ("secret", "hidden", "'me'"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout_s": 0}, {"connection_pool_size": 0}, {"username": "me"}, {"ttl_s": 0}, {"tls_cert_file": "a.pem"}, {"piece_bytes": 100},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RedisSettings(endpoint="a:1", **wrong)  # type: ignore[arg-type]


def test_a_password_file_goes_before_the_variable(tmp_path: Path) -> None:
    environ = {"KVTIERS_REMOTE_USERNAME": "me", "KVTIERS_REMOTE_PASSWORD": "from the environment"}
    path = tmp_path / "password"
    path.write_text("from the file\n")
    with pytest.raises(ConfigError, match="others can read it"):
        remote_credentials(environ, str(path))
    path.chmod(0o600)
    assert remote_credentials({}) == ("", "")
    assert remote_credentials(environ) == ("me", "from the environment")
    assert remote_credentials(environ, str(path)) == ("me", "from the file")
    with pytest.raises(ConfigError, match="none"):
        remote_credentials(environ, str(tmp_path / "none"))


def test_slots_are_those_of_the_specification() -> None:
    assert slot_of(b"123456789") == 0x31C3
    assert slot_of(b"{user1000}.following") == slot_of(b"{user1000}.followers") == slot_of(b"user1000")
    assert slot_of(b"foo{}{bar}") != slot_of(b"bar")
    assert slot_of(b"foo{{bar}}zap") == slot_of(b"{bar")
