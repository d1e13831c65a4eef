"""Every backend of the configuration becomes its store, with what the operator wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtiers.config import CacheConfig
from kvtiers.model.errors import ConfigError
from kvtiers.runtime.plan import plan_node, refusals
from kvtiers.runtime.remote_plan import BACKENDS, remote_store, what_is_missing, without_effect

ENDPOINTS = {
    "redis": "cache.internal:6379",
    "mooncake": "master.internal:50051",
    "s3": "s3://bucket/prefix",
    "fs": "/mnt/kv",
    "infinistore": "store.internal:12345",
}


def config(backend: str, **remote: Any) -> CacheConfig:
    values = {"enabled": True, "backend": backend, "endpoint": ENDPOINTS.get(backend, "a:1"), **remote}
    return CacheConfig.from_mapping({"storage": {"remote": values}}, environ={})


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_each_of_ours_is_made_without_reaching_for_its_engine(backend: str) -> None:
    assert what_is_missing(config(backend).storage.remote) is None
    store = remote_store(config(backend))
    assert store.name == backend


def test_what_was_written_for_redis_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvtiers.stores.pieces import PiecedStore
    from kvtiers.stores.redis import RedisValues

    secret = tmp_path / "password"
    secret.write_text("hush\n")
    secret.chmod(0o600)
    monkeypatch.setenv("KVTIERS_REMOTE_USERNAME", "me")
    store = remote_store(
        config(
            "redis",
            timeout_ms=1500,
            connection_pool_size=3,
            password_file=str(secret),
            redis={"ttl_s": 60, "tls_check_hostname": False},
        )
    )
    assert isinstance(store, PiecedStore)
    values = store._values
    assert isinstance(values, RedisValues)
    settings = values._settings
    assert (settings.timeout_s, settings.connection_pool_size, settings.ttl_s) == (1.5, 3, 60)
    assert (settings.username, settings.password, settings.tls_check_hostname) == ("me", "hush", False)
    assert "hush" not in repr(settings)


def test_lent_memory_is_asked_for_by_p2p_alone() -> None:
    from kvtiers.stores.mooncake.values import MooncakeValues
    from kvtiers.stores.pieces import PiecedStore

    for p2p, lent in ((True, 1 << 30), (False, 0)):
        store = remote_store(config("mooncake", p2p=p2p, segment_size="1Gi"))
        assert isinstance(store, PiecedStore)
        values = store._values
        assert isinstance(values, MooncakeValues)
        assert values._session._settings.segment_bytes == lent


@pytest.mark.parametrize(
    ("backend", "wrong", "told"),
    [
        ("redis", {"endpoint": "http://a"}, "storage.remote"),
        ("s3", {"endpoint": "bucket"}, "storage.remote"),
        ("fs", {"endpoint": "relative/path"}, "storage.remote"),
        ("mooncake", {"endpoint": "nowhere:at-all"}, "storage.remote"),
        ("redis", {"password_file": "/nowhere/at/all"}, "storage.remote"),
        ("no.such.module:Class", {}, "can't be imported"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_starts(
    backend: str, wrong: dict[str, Any], told: str
) -> None:
    try:
        problems = refusals(config(backend, **wrong))
    except ConfigError as error:
        problems = list(error.problems)
    assert len(problems) == 1
    assert told in problems[0]


def test_credentials_in_an_endpoint_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        config("redis", endpoint="redis://me:hush@host:1")
    assert "must not hold credentials" in str(caught.value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "written", "told"),
    [
        ("redis", {"p2p": True, "segment_size": "1Gi"}, ["p2p", "segment_size"]),
        ("mooncake", {"segment_size": "1Gi"}, ["segment_size"]),
        ("mooncake", {"p2p": True, "segment_size": "1Gi"}, []),
        ("mooncake", {"p2p": False, "segment_size": "4Gi"}, []),  # the defaults, written out
        ("s3", {"password_file": "/secret"}, ["password_file"]),
        ("kvtiers.testing.memory_values:memory_store", {"password_file": "/secret"}, ["password_file"]),
        (
            "infinistore",
            {"infinistore": {"rdma_port": 2, "rdma_connections": 4}},
            ["infinistore.rdma_port", "infinistore.rdma_connections"],
        ),
        ("infinistore", {"infinistore": {"rdma_device": "mlx5_0", "rdma_port": 2}}, []),
        ("redis", {"infinistore": {"rdma_device": "mlx5_0"}}, ["infinistore.rdma_device"]),
        ("fs", {"s3": {"region": "eu"}, "fs": {"group_shared": True}}, ["s3.region"]),
        ("redis", {"password_file": "/secret", "redis": {"ttl_s": 5}, "compression": "none"}, []),
    ],
)
def test_keys_that_nothing_reads_are_named(backend: str, written: dict[str, Any], told: list[str]) -> None:
    sentences = without_effect(config(backend, **written))
    assert [one.split(" ")[0] for one in sentences] == [f"storage.remote.{key}" for key in told]
    assert all("has no effect" in one and "/secret" not in one for one in sentences)


def test_a_cache_says_at_start_which_keys_nothing_reads(caplog: pytest.LogCaptureFixture) -> None:
    plan_node(config("fs", p2p=True))
    (warning,) = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert warning.startswith("storage.remote.p2p (argument): has no effect: backend fs does not read it")
