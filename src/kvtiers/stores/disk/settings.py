"""What the disk store needs to know. Plain values: `runtime` makes them from the configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kvtiers.model.errors import ConfigError
from kvtiers.records.codecs.base import Codec
from kvtiers.records.codecs.none import NoCodec


class Durability(StrEnum):
    """What a record that was written survives."""

    RENAME = "rename"
    """A killed process. After a power cut recent records may be missing or torn; torn ones fail their checksum."""
    FSYNC = "fsync"
    """A power cut as well: file, index log and directory are synced before `write` returns."""


class DirectIO(StrEnum):
    """Whether records bypass the page cache."""

    AUTO = "auto"
    """Where the file system offers it with an alignment of at most 4 KiB, else buffered."""
    OFF = "off"
    """Always buffered."""


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """Settings of one `DiskStore`."""

    paths: tuple[str, ...]
    """One directory per disk. The order does not matter and may change between runs."""
    durability: Durability = Durability.RENAME
    direct_io: DirectIO = DirectIO.AUTO
    codec: Codec = field(default_factory=NoCodec)
    """For new records; what others encoded is read as well."""
    min_free_bytes: int = 256 << 20
    """A write that would leave less than this on its file system is refused as StoreFull."""
    scratch_buffers: int = 16
    """Buffers kept for headers and encoded records; one or two per I/O thread."""
    scratch_bytes: int = 256 << 20
    """Bound of the memory these keep."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "durability", Durability(self.durability))
        object.__setattr__(self, "direct_io", DirectIO(self.direct_io))
        object.__setattr__(self, "paths", tuple(os.path.abspath(path) for path in self.paths))
        problems = _problems_of(self.paths)
        if self.min_free_bytes < 0:
            problems.append(f"min_free_bytes must be at least 0, got {self.min_free_bytes}")
        if problems:
            raise ConfigError(problems, source="disk settings")


def _problems_of(paths: Sequence[str]) -> list[str]:
    if not paths:
        return ["paths must name at least one directory"]
    problems = []
    for index, path in enumerate(paths):
        for other in paths[index + 1 :]:
            if path == other:
                problems.append(f"{path} is given twice")
            elif os.path.commonpath([path, other]) in (path, other):
                problems.append(
                    f"of {path} and {other} one lies inside the other; each would count the other's files"
                )
    return problems
