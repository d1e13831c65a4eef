"""What a run is asked for, checked before anything is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvtiers.config import PathSpace, format_size
from kvtiers.model.errors import ConfigError, DoesNotFit
from kvtiers.ops.bench.shapes import TINY, Shape

_RESERVE: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """Of one run."""

    shapes: tuple[Shape, ...]
    rounds: int
    directory: Path
    """Where files are written; each subject takes a directory of its own below it, and removes it."""
    peer: str | None = None
    """A command line; see `PeerProcess`."""

    @property
    def is_tiny(self) -> bool:
        """For tests: everything is done, nothing is worth a look."""
        return any(shape.name == TINY for shape in self.shapes)


def check_directory(directory: Path) -> None:
    """It exists and can be written, or can be made. Raises ConfigError."""
    space = PathSpace.probe(directory, count_own=False)
    if space.problem:
        raise ConfigError([f"{directory} {space.problem}"], source="--directory")


def check_room(directory: Path, nbytes: int) -> None:
    """Room for so much, and a reserve. Raises DoesNotFit."""
    space = PathSpace.probe(directory, count_own=False)
    if space.free < nbytes + _RESERVE:
        problem = (
            f"{directory}: {format_size(space.free)} are free, but this run writes {format_size(nbytes + _RESERVE)}; "
            "name a directory on another disk"
        )
        raise DoesNotFit([problem], source="--directory")


@contextmanager
def working_directory(below: Path) -> Iterator[Path]:
    """A new one, removed at the end with all that is in it. Raises ConfigError if it can't be made."""
    try:
        below.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="kvtiers-bench-", dir=below)
    except OSError as error:
        raise ConfigError([f"{below} can't be written: {error.strerror}"], source="--directory") from error
    with made as name:
        yield Path(name)


def make_output(output: Path) -> None:
    """The directory for the results. Raises ConfigError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"{output}: {error.strerror}"], source="--output") from error
    space = PathSpace.probe(output, count_own=False)
    if space.problem:
        raise ConfigError([f"{output} {space.problem}"], source="--output")
