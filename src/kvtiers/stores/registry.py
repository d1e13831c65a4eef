"""Which store a name stands for: ours, one that another package has registered as an entry point, or `package.module:Class`.

An entry point of the group `kvtiers.stores`, or the class, is called with one `RemoteSettings` and gives a `RecordStore`, or an object
with `as_record_store(settings)` that makes itself one (an LMCache-compatible `StorageBackend` does).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Final

from kvtiers.model.errors import ConfigError, KvtiersError
from kvtiers.records.codecs.base import Codec
from kvtiers.stores.base import RecordStore

GROUP: Final = "kvtiers.stores"


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """What a store of another package is told."""

    endpoint: str
    timeout_s: float
    """Within which each call has to end."""
    connection_pool_size: int
    codec: Codec
    """For new records."""


def find_factory(name: str) -> Callable[[RemoteSettings], Any] | None:
    """What makes the store of that name; None if nobody has registered it. Raises ConfigError for a path that can't be imported."""
    if ":" in name:
        return _imported(name)
    found = [point for point in entry_points(group=GROUP) if point.name == name]
    if not found:
        return None
    try:
        made: Callable[[RemoteSettings], Any] = found[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError([f"the store {name} of {found[0].value} can't be loaded: {error}"]) from error
    return made


def make_store(name: str, factory: Callable[[RemoteSettings], Any], settings: RemoteSettings) -> RecordStore:
    """The store. Raises ConfigError if the factory gives none."""
    try:
        made = factory(settings)
        if not isinstance(made, RecordStore) and hasattr(made, "as_record_store"):
            made = made.as_record_store(settings)
    except KvtiersError:
        raise
    except Exception as error:
        raise ConfigError([f"{name} could not be made: {type(error).__name__}: {error}"]) from error
    if not isinstance(made, RecordStore):
        raise ConfigError(
            [
                f"{name} gives a {type(made).__name__}: neither a kvtiers.stores.base.RecordStore nor a kvtiers.compat.StorageBackend"
            ]
        )
    return made


def _imported(name: str) -> Callable[[RemoteSettings], Any]:
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for step in attribute.split("."):
            found = getattr(found, step)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError([f"storage.remote.backend = {name}: can't be imported: {error}"]) from error
    if not callable(found):
        raise ConfigError([f"storage.remote.backend = {name}: is a {type(found).__name__}, not a class"])
    factory: Callable[[RemoteSettings], Any] = found
    return factory
