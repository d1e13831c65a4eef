"""`storage.remote:` of the configuration: what holds of every backend, and a section for what is particular to one."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from kvtiers.config.fields import (
    SIZE_FORMS,
    Codec,
    Count,
    Number,
    PoolSize,
    problem,
    setting,
)
from kvtiers.config.section import Section
from kvtiers.config.sizes import GIB, MIB

_NONE = "none"


def _no_credentials(endpoint: str) -> str:
    authority = endpoint.partition("://")[2].partition("/")[0] if "://" in endpoint else endpoint
    if "@" in authority:
        raise problem(
            "must not hold credentials: an endpoint is written to logs. Set KVTIERS_REMOTE_USERNAME and KVTIERS_REMOTE_PASSWORD, "
            "or storage.remote.password_file"
        )
    return endpoint


Endpoint = Annotated[str, AfterValidator(_no_credentials)]


def _text(effect: str, *, allowed: str = "", default: Any = None, shown_default: str = _NONE) -> Any:
    return setting(default, effect, allowed=allowed, shown_default=shown_default, min_length=1)


class RedisConfig(Section):
    """Redis, Valkey, Dragonfly or KVRocks."""

    ttl_s: Annotated[int, Field(ge=1)] | None = setting(
        None,
        "The engine forgets a record so long after it was written. Without it the engine evicts as it is told to.",
        unit="seconds",
        shown_default="none",
    )
    tls_ca_file: str | None = _text(
        "Certificates of the authorities that the server's is checked with.",
        allowed="a PEM file",
        shown_default="the system's",
    )
    tls_cert_file: str | None = _text(
        "Our own certificate, where the server wants one.", allowed="a PEM file"
    )
    tls_key_file: str | None = _text("The key of that.", allowed="a PEM file")
    tls_check_hostname: bool = setting(
        True, "Whether the server's certificate must be of the host in the endpoint."
    )


class MooncakeConfig(Section):
    """A Mooncake Store. `p2p` and `segment_size` stand one level up."""

    local_host: str | None = _text(
        "Under which the peers reach this node.",
        allowed="a name or address",
        shown_default="its address towards the master",
    )
    protocol: Literal["tcp", "rdma"] = setting("tcp", "How bytes travel.")
    rdma_devices: str | None = _text(
        "With rdma: which devices.",
        allowed="names, separated by commas",
        shown_default="the client chooses",
    )
    metadata_server: str = _text(
        "Peers tell each other where their memory is, or the URL of a metadata server.",
        default="P2PHANDSHAKE",
        shown_default="P2PHANDSHAKE",
    )
    ssd_offload_path: str | None = _text(
        "Values evicted from lent memory go to this directory; the master has to run with --enable_offload=true.",
        allowed="a directory",
        shown_default="no offload",
    )


class InfiniStoreConfig(Section):
    """An InfiniStore server. Without `rdma_device` all goes over TCP."""

    rdma_device: str | None = _text(
        "KV travels by RDMA through this device, by the package infinistore. Not run on a host with such a device.",
        allowed="a name, as in /sys/class/infiniband",
        shown_default="none: TCP",
    )
    rdma_port: Count = setting(1, "With rdma_device: which port of it.", ge=1, le=255)
    rdma_connections: Count = setting(
        2,
        "With rdma_device: transfers under way at a time. Each pins 512 MiB here and as much in the server.",
        ge=1,
        le=64,
    )


class S3Config(Section):
    """An S3-compatible store, Google Cloud Storage or Azure."""

    endpoint_url: str | None = _text(
        "Where the service is, unless it is the provider's own.",
        allowed="http://host:port or https://…",
        shown_default="the provider's",
    )
    region: str | None = _text("Of the bucket.", shown_default="as the environment says")
    credentials_file: str | None = _text(
        "File with the credentials, readable by its owner only; otherwise the environment (AWS_ACCESS_KEY_ID, …) is asked.",
        allowed="a path",
        shown_default="the environment",
    )
    ca_file: str | None = _text(
        "Certificates of the authorities that the service's is checked with.",
        allowed="a PEM file",
        shown_default="the system's",
    )


class SharedFsConfig(Section):
    """A directory that several hosts share."""

    group_shared: bool = setting(
        False,
        "Files 0660 and directories 2770 instead of 0600 and 0700: for hosts whose services run as different users of one group.",
    )
    durability: Literal["rename", "fsync"] = setting("rename", "As for disk.")
    orphan_age_s: Number = setting(
        3600.0,
        "After so long an unfinished file is taken to be a dead host's. Longer than any write may take.",
        unit="seconds",
        gt=0,
    )


class RemoteConfig(Section):
    """A store that several instances share."""

    enabled: bool = setting(False, "Share KV with other instances through a remote store.")
    backend: str | None = setting(
        None,
        "Which store. One that this installation does not have gives a warning at start, and the cache runs without it.",
        allowed="redis, mooncake, s3, infinistore, fs, an installed one, or package.module:Class; needed when enabled",
        shown_default="none",
        min_length=1,
    )
    endpoint: Endpoint | None = setting(
        None,
        "Where it is: host:port, a URL or a path, as the backend understands it. Never with credentials.",
        allowed="needed when enabled",
        shown_default="none",
        min_length=1,
    )
    connection_pool_size: Count = setting(
        32, "Calls to the store under way at a time, at most.", ge=1, le=4096
    )
    timeout_ms: Number = setting(
        5000.0, "A call that takes longer has failed: a read is a miss.", unit="milliseconds", gt=0
    )
    password_file: str | None = setting(
        None,
        "File with the password, readable by its owner only. Otherwise KVTIERS_REMOTE_PASSWORD; the user is KVTIERS_REMOTE_USERNAME.",
        allowed="a path",
        shown_default="none",
        min_length=1,
    )
    compression: Codec = setting(
        "zstd", "As for disk; over a network it usually pays.", allowed="none, zstd, or an installed codec"
    )
    compression_level: Count = setting(3, "As for disk.", ge=1, le=22)
    write_policy: Literal["write_through", "write_on_evict"] = setting(
        "write_through",
        "write_through: uploaded in the background as soon as a chunk is stored, unless it is there already. write_on_evict: when it leaves memory and the disk does not take it.",
    )
    max_upload_bytes_per_s: PoolSize | None = setting(
        None,
        "Pace of uploads, in bytes of KV before compression.",
        unit="size a second",
        allowed=SIZE_FORMS,
        shown_default="as fast as they go",
    )
    max_upload_wait_s: Number = setting(
        60.0,
        "A chunk that has waited so long to be uploaded is given up until it is used again.",
        unit="seconds",
        gt=0,
    )
    max_queue_bytes: PoolSize = setting(
        256 * MIB,
        "Bytes that may be on their way to the store at a time. Chunks beyond it hold nothing and wait.",
        unit="size",
        allowed=SIZE_FORMS,
    )
    known_for_s: Number = setting(
        60.0,
        "What the store was found to have is believed for so long without asking again. Nothing is served unverified all the same.",
        unit="seconds",
        gt=0,
    )
    absent_for_s: Number = setting(
        2.0,
        "What the store was found not to have is not asked for again for so long.",
        unit="seconds",
        ge=0,
    )
    p2p: bool = setting(
        False, "Mooncake: lend segment_size of this node's memory to its peers, and read from theirs."
    )
    segment_size: PoolSize = setting(
        4 * GIB, "With p2p: how much memory this node lends.", unit="size", allowed=SIZE_FORMS
    )
    redis: RedisConfig = Field(default_factory=RedisConfig)
    mooncake: MooncakeConfig = Field(default_factory=MooncakeConfig)
    s3: S3Config = Field(default_factory=S3Config)
    infinistore: InfiniStoreConfig = Field(default_factory=InfiniStoreConfig)
    fs: SharedFsConfig = Field(default_factory=SharedFsConfig)

    @model_validator(mode="after")
    def _enabled_needs_an_address(self) -> Self:
        missing = [name for name in ("backend", "endpoint") if getattr(self, name) is None]
        if self.enabled and missing:
            too = f", and so is {missing[1]}" if len(missing) > 1 else ""
            raise problem(f"is needed when the remote tier is enabled{too}", *missing, "enabled")
        return self
