"""The one error tree. Whoever catches `KvtiersError` has caught everything kvtiers raises on purpose.

    KvtiersError
    ├── ConfigError                what an operator wrote is wrong (lists every problem)
    │   └── DoesNotFit             it parses, but this machine is too small for it
    ├── InvalidArgument            a call was given something it can't take (a `ValueError`, too)
    │   ├── LayoutMismatch         KV or token ids of another shape, dtype or size than the layout says
    │   ├── UnknownTier            there is no tier of this name
    │   └── TierDisabled           the tier exists, but the configuration switches it off
    ├── CacheClosed                a call after `close()`
    ├── DirectoryInUse             another process owns the disk directory
    ├── DeadlineExceeded           a wait ended at its deadline
    ├── StoreError                 a tier's engine could not do what was asked
    │   ├── RecordMissing          no such record: a miss, never retried
    │   ├── RecordInvalid          what lies there is not what was stored: a miss, the record is removed
    │   │   ├── RecordCorrupt      checksum, size or padding is wrong
    │   │   └── RecordForeign      a sound record of another key, namespace, layout or format version
    │   ├── StoreFull              no space; reads go on
    │   ├── StoreTransient         may work if tried again
    │   └── StoreUnavailable       the engine can't be reached, or its breaker is open
    ├── CodecError                 a codec's input or output makes no sense
    ├── OutOfMemoryError           the arena or a pool has no room (compat; the core answers with a `Refusal`)
    └── InvariantBroken            a bug in kvtiers: a rule that must always hold did not

Inside the cache a failed tier is a miss; these errors reach a caller only where the call itself can't be served.
"""

from __future__ import annotations

from collections.abc import Sequence


class KvtiersError(Exception):
    """Root of everything kvtiers raises on purpose."""


class ConfigError(KvtiersError):
    """The configuration is wrong. `problems` holds one line for each thing to mend."""

    def __init__(self, problems: Sequence[str], *, source: str = "configuration") -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        self.source = source
        count = len(self.problems)
        head = f"{source}: {count} problem{'' if count == 1 else 's'}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_config_error, (type(self), self.problems, self.source)


def _rebuild_config_error(cls: type[ConfigError], problems: Sequence[str], source: str) -> ConfigError:
    return cls(problems, source=source)


class DoesNotFit(ConfigError):
    """The configuration is well formed, but this machine has not what it asks for."""


class InvalidArgument(KvtiersError, ValueError):
    """An argument is of the wrong type or out of range; the message says what is allowed."""


class LayoutMismatch(InvalidArgument):
    """KV or token ids that do not have the shape, dtype or size the layout promises."""


class UnknownTier(InvalidArgument):
    """There is no tier of this name here."""


class TierDisabled(InvalidArgument):
    """The tier is switched off in the configuration, so there is nothing in it to work on."""


class CacheClosed(KvtiersError):
    """The cache was closed; open a new one."""


class DirectoryInUse(KvtiersError):
    """Another process owns this cache directory."""


class DeadlineExceeded(KvtiersError):
    """A wait reached its deadline; the work may still finish in the background."""


class StoreError(KvtiersError):
    """A record store could not do what was asked."""


class RecordMissing(StoreError):
    """There is no such record."""


class RecordInvalid(StoreError):
    """The record that lies there must not be served."""


class RecordCorrupt(RecordInvalid):
    """The record's checksum, size or padding is wrong."""


class RecordForeign(RecordInvalid):
    """A sound record, but of another key, namespace, layout or format version."""


class StoreFull(StoreError):
    """The store has no space left; reads go on."""


class StoreTransient(StoreError):
    """The operation failed in a way that may pass; a guard may try again."""


class StoreUnavailable(StoreError):
    """The store can't be reached, or its breaker is open."""


class CodecError(KvtiersError):
    """A codec was given, or produced, something it can't stand for."""


class OutOfMemoryError(KvtiersError):
    """A pool has no room for the allocation."""


class InvariantBroken(KvtiersError):
    """A bug in kvtiers. Please report it with the message."""
