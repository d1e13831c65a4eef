"""What the store in a shared directory needs to know. Plain values: `runtime` makes them from the configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from kvtiers.model.errors import ConfigError
from kvtiers.stores.disk.settings import DirectIO, Durability


@dataclass(frozen=True, slots=True)
class SharedFsSettings:
    """Settings of the store in one shared directory."""

    endpoint: str
    """Absolute path of a directory that is there, or that as a file:// URL."""
    group_shared: bool = False
    """Files 0660 and directories 2770 instead of 0600 and 0700: for hosts whose services run as different users of one group."""
    durability: Durability = Durability.RENAME
    direct_io: DirectIO = DirectIO.AUTO
    parallel_stats: int = 32
    """Names looked up at a time when each takes a round trip."""
    orphan_age_s: float = 3600.0
    """After so long an unfinished file is taken to be a dead host's. Longer than any write may take."""
    scratch_buffers: int = 16
    scratch_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        object.__setattr__(self, "durability", Durability(self.durability))
        object.__setattr__(self, "direct_io", DirectIO(self.direct_io))
        problems = [
            f"{name} must be above 0, got {getattr(self, name)}"
            for name in ("parallel_stats", "orphan_age_s")
            if not getattr(self, name) > 0
        ]
        try:
            directory_of(self.endpoint)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError(problems, source="settings of the shared directory")


def directory_of(endpoint: str) -> str:
    """The directory an endpoint names. Raises ValueError."""
    path = endpoint
    if "://" in endpoint:
        url = urlsplit(endpoint)
        if url.scheme != "file" or url.netloc not in ("", "localhost") or url.query or url.fragment:
            raise ValueError(f"{endpoint} is no file:///absolute/path")
        path = unquote(url.path)
    if not os.path.isabs(path) or "\0" in path:
        raise ValueError(
            f"{endpoint!r} must be the absolute path of a shared directory, or file:// and that path"
        )
    return os.path.normpath(path)
