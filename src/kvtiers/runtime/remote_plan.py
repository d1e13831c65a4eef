"""From `storage.remote:` to a store and how it is driven.

A backend whose client is not installed, or that nobody has registered, is no reason not to start: the cache says so once and runs
without the tier.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import reduce
from importlib.util import find_spec
from typing import Final, NamedTuple

from kvtiers.config import CacheConfig
from kvtiers.config.remote import RemoteConfig
from kvtiers.core.remembering import Remember
from kvtiers.core.settings import StoreSettings, WritePolicy
from kvtiers.model.errors import ConfigError
from kvtiers.records.codecs.base import Codec
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore
from kvtiers.stores.registry import RemoteSettings, find_factory, make_store

_READ_BY: Final = {"p2p": "mooncake", "segment_size": "mooncake", "password_file": "redis"}
"""Keys beside the sections of single backends that are for one of them all the same."""


class Backend(NamedTuple):
    """One of ours."""

    client: str
    """Module that it needs; "" for none."""
    extra: str
    """Of kvtiers, which brings that."""
    make: Callable[[RemoteConfig, Codec], RecordStore]


def remote_codec(config: CacheConfig) -> Codec:
    """For new records. Raises CodecError, ImportError for one that can't be loaded."""
    remote = config.storage.remote
    options = {"level": remote.compression_level} if remote.compression == "zstd" else {}
    return codec_for(remote.compression, **options)


def what_is_missing(remote: RemoteConfig) -> str | None:
    """Why the cache will run without the remote tier, if it will. Raises ConfigError."""
    name = remote.backend or ""
    ours = BACKENDS.get(name)
    if ours is None:
        if find_factory(name) is not None:
            return None
        return (
            f"storage.remote.backend = {name}: nobody has registered it; there are {', '.join(BACKENDS)}, entry points of "
            "kvtiers.stores, and package.module:Class"
        )
    if ours.client and find_spec(ours.client) is None:
        return f"storage.remote.backend = {name}: its client is not installed: pip install 'kvtiers[{ours.extra}]'"
    if (
        name == "infinistore"
        and remote.infinistore.rdma_device is not None
        and find_spec("infinistore") is None
    ):
        return (
            "storage.remote.infinistore.rdma_device: the client for RDMA is not installed: "
            "pip install --no-deps infinistore==0.2.35"
        )
    return None


def without_effect(config: CacheConfig) -> list[str]:
    """A sentence for each key of the remote tier that was changed, and that nothing reads: it is another backend's, or needs another key."""
    remote, defaults = config.storage.remote, RemoteConfig()
    told = []
    for one in config.effective():
        *above, name = one.setting.path
        if above[:2] != ["storage", "remote"]:
            continue
        owner = above[2] if above[2:] else _READ_BY.get(name)
        default = reduce(getattr, one.setting.attributes[2:], defaults)
        if owner is None or one.value == default:
            continue
        if owner != remote.backend:
            reason = f"backend {remote.backend} does not read it, {owner} does"
        elif name == "segment_size" and not remote.p2p:
            reason = "nothing is lent without storage.remote.p2p"
        elif name in ("rdma_port", "rdma_connections") and remote.infinistore.rdma_device is None:
            reason = "all goes over TCP without storage.remote.infinistore.rdma_device"
        else:
            continue
        told.append(f"{one.setting.key} ({one.source}): has no effect: {reason}")
    return told


def remote_store(config: CacheConfig) -> RecordStore:
    """The store; it has not reached for its engine yet. Raises ConfigError with every problem of its settings."""
    remote = config.storage.remote
    name, codec = remote.backend or "", remote_codec(config)
    ours = BACKENDS.get(name)
    if ours is not None:
        return ours.make(remote, codec)
    factory = find_factory(name)
    if factory is None:
        raise ConfigError([f"storage.remote.backend = {name}: nobody has registered it"])
    settings = RemoteSettings(
        endpoint=remote.endpoint or "",
        timeout_s=remote.timeout_ms / 1000,
        connection_pool_size=remote.connection_pool_size,
        codec=codec,
    )
    return make_store(name, factory, settings)


def remote_settings(config: CacheConfig) -> StoreSettings:
    """What the core has to know: others share it, and it bounds itself."""
    remote = config.storage.remote
    return StoreSettings(
        capacity=None,
        ceiling=None,
        low=None,
        write_policy=WritePolicy(remote.write_policy),
        max_queued=config.async_.queue_size,
        max_queued_bytes=remote.max_queue_bytes,
        max_write_bytes_per_s=remote.max_upload_bytes_per_s,
        max_wait_s=remote.max_upload_wait_s,
        remember=Remember(there_s=remote.known_for_s, absent_s=remote.absent_for_s),
    )


def _redis(remote: RemoteConfig, codec: Codec) -> RecordStore:
    from kvtiers.stores.redis import RedisSettings, redis_store, remote_credentials
    from kvtiers.stores.redis.settings import SENTINEL_PASSWORD_VARIABLE, SENTINEL_USERNAME_VARIABLE

    username, password = remote_credentials(os.environ, remote.password_file or "")
    return redis_store(
        RedisSettings(
            endpoint=remote.endpoint or "",
            timeout_s=remote.timeout_ms / 1000,
            connection_pool_size=remote.connection_pool_size,
            username=username,
            password=password,
            sentinel_username=os.environ.get(SENTINEL_USERNAME_VARIABLE, ""),
            sentinel_password=os.environ.get(SENTINEL_PASSWORD_VARIABLE, ""),
            tls_ca_file=remote.redis.tls_ca_file or "",
            tls_cert_file=remote.redis.tls_cert_file or "",
            tls_key_file=remote.redis.tls_key_file or "",
            tls_check_hostname=remote.redis.tls_check_hostname,
            ttl_s=remote.redis.ttl_s,
        ),
        codec,
    )


def _mooncake(remote: RemoteConfig, codec: Codec) -> RecordStore:
    from kvtiers.stores.mooncake.settings import MooncakeSettings
    from kvtiers.stores.mooncake.values import mooncake_store

    own = remote.mooncake
    return mooncake_store(
        MooncakeSettings(
            endpoint=remote.endpoint or "",
            timeout_s=remote.timeout_ms / 1000,
            connection_pool_size=remote.connection_pool_size,
            segment_bytes=remote.segment_size if remote.p2p else 0,
            local_host=own.local_host or "",
            protocol=own.protocol,
            rdma_devices=own.rdma_devices or "",
            metadata_server=own.metadata_server,
            enable_ssd_offload=own.ssd_offload_path is not None,
            ssd_offload_path=own.ssd_offload_path or "",
        ),
        codec,
    )


def _s3(remote: RemoteConfig, codec: Codec) -> RecordStore:
    from kvtiers.stores.s3 import S3Settings, s3_store

    return s3_store(
        S3Settings(
            endpoint=remote.endpoint or "",
            endpoint_url=remote.s3.endpoint_url,
            region=remote.s3.region,
            credentials_file=remote.s3.credentials_file,
            ca_file=remote.s3.ca_file,
            timeout_s=remote.timeout_ms / 1000,
            connection_pool_size=remote.connection_pool_size,
        ),
        codec,
    )


def _infinistore(remote: RemoteConfig, codec: Codec) -> RecordStore:
    from kvtiers.stores.infinistore.values import InfiniStoreSettings, infinistore_store

    own = remote.infinistore
    settings = InfiniStoreSettings(
        endpoint=remote.endpoint or "",
        timeout_s=remote.timeout_ms / 1000,
        connection_pool_size=remote.connection_pool_size,
        rdma_device=own.rdma_device or "",
        rdma_port=own.rdma_port,
        rdma_connections=own.rdma_connections,
    )
    if not settings.rdma_device:
        return infinistore_store(settings, codec)
    from kvtiers.stores.infinistore.rdma import infinistore_rdma_store

    return infinistore_rdma_store(settings, codec)


def _fs(remote: RemoteConfig, codec: Codec) -> RecordStore:
    from kvtiers.stores.shared_fs import SharedFsSettings, shared_fs_store

    return shared_fs_store(
        SharedFsSettings(
            endpoint=remote.endpoint or "",
            group_shared=remote.fs.group_shared,
            parallel_stats=remote.connection_pool_size,
            durability=remote.fs.durability,  # type: ignore[arg-type] # it makes one of it
            orphan_age_s=remote.fs.orphan_age_s,
        ),
        codec,
    )


BACKENDS: Final[Mapping[str, Backend]] = {
    "redis": Backend("redis", "redis", _redis),
    "mooncake": Backend("mooncake", "mooncake", _mooncake),
    "s3": Backend("obstore", "s3", _s3),
    "infinistore": Backend("", "", _infinistore),
    "fs": Backend("", "", _fs),
}
"""By the name in the configuration."""
