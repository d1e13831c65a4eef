"""What the object store needs to know. Plain values, none of them a secret: `runtime` makes them from the configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from kvtiers.model.errors import ConfigError

SCHEMES: Final = ("s3", "gs", "az")
_PREFIX: Final = re.compile(r"(/[A-Za-z0-9!_.*'()=-]+)*/?")


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Settings of one `S3Store`."""

    endpoint: str
    """s3://bucket/prefix, gs://bucket/prefix or az://container/prefix; the prefix may be left out. The bucket must be there."""
    endpoint_url: str | None = None
    """http(s)://host:port of a service that is not Amazon's; s3:// only."""
    region: str | None = None
    """s3:// only. Default: AWS_REGION of the environment, else us-east-1."""
    credentials_file: str | None = None
    """s3://: a file as ~/.aws/credentials, read anew every five minutes; gs://: a service account's JSON. Default: the environment."""
    ca_file: str | None = None
    """PEM file of certificates to trust beside the system's."""
    timeout_s: float = 5.0
    """Of each call, from connecting to the last byte."""
    connection_pool_size: int = 32
    scratch_buffers: int = 32
    scratch_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be above 0, got {getattr(self, name)}"
            for name in ("timeout_s", "connection_pool_size")
            if not getattr(self, name) > 0
        ]
        problems += _problems_of_endpoint(self.endpoint)
        if self.endpoint_url is not None:
            problems += _problems_of_url(self.endpoint_url)
        for name, value, schemes in (
            ("endpoint_url", self.endpoint_url, ("s3",)),
            ("region", self.region, ("s3",)),
            ("credentials_file", self.credentials_file, ("s3", "gs")),
        ):
            if value is not None and self.scheme in SCHEMES and self.scheme not in schemes:
                problems.append(f"{name} has no meaning for {self.scheme}://")
        if problems:
            raise ConfigError(problems, source="settings of the object store")

    @property
    def scheme(self) -> str:
        """Which kind of service."""
        return self.endpoint.partition("://")[0]

    @property
    def place(self) -> str:
        """Bucket and service, for messages."""
        return f"{self.endpoint} at {self.endpoint_url}" if self.endpoint_url else self.endpoint


def _problems_of_endpoint(endpoint: str) -> list[str]:
    try:
        url = urlsplit(endpoint)
    except ValueError:
        url = urlsplit("")
    if url.username is not None or url.password is not None:
        return ["endpoint must hold no credentials: they come from the environment or credentials_file"]
    if url.scheme not in SCHEMES or not url.netloc or url.query or url.fragment:
        return ["endpoint must be s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"]
    if not _PREFIX.fullmatch(url.path) or any(name in (".", "..") for name in url.path.split("/")):
        return ["the prefix in endpoint may have letters, digits and !-_.*'()= between single slashes"]
    return []


def _problems_of_url(endpoint_url: str) -> list[str]:
    try:
        url = urlsplit(endpoint_url)
        sound = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        return ["endpoint_url must be http://host:port or https://host:port"]
    if url.username is not None or url.password is not None:
        return ["endpoint_url must hold no credentials: they come from the environment or credentials_file"]
    if not sound or url.path not in ("", "/") or url.query or url.fragment:
        return ["endpoint_url must be http://host:port or https://host:port"]
    return []
