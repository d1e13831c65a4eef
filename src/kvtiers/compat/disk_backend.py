"""`DiskBackend`: the disk tier's own store behind the LMCache-compatible contract.

A `str` key becomes its SHA-256. Each value is one sealed record: header, checksums, published by rename, verified at every read. I/O
runs on the daemon threads of the directory's `SharedDisk`, so calls may be awaited from any event loop, and each has a deadline.
`exists` reads memory only.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from kvtiers.compat.answers import Answer
from kvtiers.compat.backend import LocalBackend
from kvtiers.compat.collected import when_collected
from kvtiers.compat.payload import MemoryObj, Payload
from kvtiers.compat.shared_disk import DiskLease, DiskOptions, SharedDisk
from kvtiers.core.messages import OpId, Priority
from kvtiers.model.errors import ConfigError, DeadlineExceeded, InvalidArgument, StoreUnavailable
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import RecordRef
from kvtiers.records.checksum import checksum
from kvtiers.stores.base import SealedPart, StoreUsage

T = TypeVar("T")

_NAMESPACE: Final = hashlib.sha256(b"kvtiers LMCache-compatible backend 1").digest()
_NO_PARENT: Final = ChunkKey(bytes(32))
_EMPTY_AT: Final = 1
"""A record has at least one byte of payload. No bytes at all are stored as one, marked by this token start."""
_ITEMSIZES: Final = (1, 2, 4, 8)


class DiskBackend(LocalBackend):
    """Keeps bytes of any length, none included, as files below `base_path`."""

    def __init__(
        self,
        base_path: str | os.PathLike[str],
        compression: str = "zstd",
        *,
        compression_level: int = 3,
        itemsize: int = 2,
        deadline_s: float = 30.0,
    ) -> None:
        """`itemsize`: bytes per KV element, by which zstd deals bytes into planes (it saves space, any value is right).

        Any number in one process may share a directory, with the same compression. Raises DirectoryInUse if another process,
        or a cache, has it; ConfigError, CodecError for options that can't be; StoreUnavailable for a path that can't be used.
        """
        if itemsize not in _ITEMSIZES or deadline_s <= 0:
            raise ConfigError(
                [
                    f"itemsize must be one of {_ITEMSIZES} and deadline_s above 0, got {itemsize} and {deadline_s}"
                ],
                source="DiskBackend",
            )
        self.base_path: Final = Path(base_path)
        self.compression: Final = compression
        self._itemsize = itemsize
        self._deadline_s = deadline_s
        self._lease = DiskLease(self.base_path, DiskOptions(compression, compression_level))
        self._keep = when_collected(self, self._lease.release)

    # --- the contract -------------------------------------------------------------------------------------------------

    async def write(self, key: str, data: MemoryObj) -> bool:
        """Store atomically; takes any contiguous buffer. What is stored is what it holds at the call, or a read will miss it.

        True, or raises StoreFull (no space: reads go on), StoreTransient, StoreUnavailable, DeadlineExceeded (it may still be
        stored), LayoutMismatch, InvalidArgument.
        """
        _ref_of(key)
        payload = Payload(data)

        def put() -> int:
            return self._put(key, payload.view, payload.digest)

        try:
            op, answer = self._disk().start(Priority.STORE, put, payload.let_go)
        except BaseException:
            payload.let_go()
            raise
        await self._ended(op, answer, f"writing {key!r}")
        return True

    async def read(self, key: str) -> bytes | None:
        """None for what is not there, and for what fails its checks: that is counted, removed, and heals with the next write.

        Raises StoreTransient, StoreUnavailable, DeadlineExceeded.
        """
        ref, disk = _ref_of(key), self._disk()
        op, answer = disk.start(Priority.LOAD, partial(disk.get, ref), _nothing)
        found = await self._ended(op, answer, f"reading {key!r}")
        if found is None:
            return None
        data, token_start = found
        return b"" if token_start == _EMPTY_AT else data

    async def delete(self, key: str) -> bool:
        """False if it was not there. Raises as `read`."""
        ref, disk = _ref_of(key), self._disk()
        op, answer = disk.start(Priority.DELETE, partial(disk.remove, ref), _nothing)
        return await self._ended(op, answer, f"deleting {key!r}")

    async def exists(self, key: str) -> bool:
        """From memory."""
        return self._disk().holds(_ref_of(key))

    def put_now(self, key: str, payload: memoryview, digest: bytes) -> None:
        """`write` on the calling thread, for the offload engine's workers; no deadline of its own."""
        self._put(key, payload, digest)

    # --- operating ----------------------------------------------------------------------------------------------------

    def stats(self) -> Mapping[str, int]:
        """Counters of the directory since it was opened, of all who share it: `corrupt`, `bytes_written`, …"""
        return self._disk().store.stats()

    def usage(self) -> StoreUsage:
        """Bytes and records below `base_path`, and bytes free on its file system."""
        return self._disk().store.usage()

    def close(self) -> None:
        """Let the directory go, if nobody else here uses it; idempotent. Takes ten seconds at most, however the disk is."""
        self._keep()
        self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _disk(self) -> SharedDisk:
        disk = self._lease.disk
        if disk is None:
            raise StoreUnavailable(f"this backend on {self.base_path} was closed; make a new one")
        return disk

    def _put(self, key: str, payload: memoryview, digest: bytes) -> int:
        empty = not payload
        stored = memoryview(b"\0") if empty else payload
        return self._disk().put(
            SealedPart(
                ref=_ref_of(key),
                parent=_NO_PARENT,
                num_parts=1,
                token_start=_EMPTY_AT if empty else 0,
                token_count=1,
                itemsize=self._itemsize,
                checksum=checksum(stored) if empty else digest,
                payload=stored,
            )
        )

    async def _ended(self, op: OpId, answer: Answer[T], what: str) -> T:
        disk = self._disk()
        try:
            return await answer.wait(self._deadline_s, what)
        except (DeadlineExceeded, asyncio.CancelledError):
            disk.cancel(op)  # if it has not begun, it never will
            raise


def _nothing() -> None:
    """There is nothing to let go of."""


def _ref_of(key: str) -> RecordRef:
    if not isinstance(key, str):
        raise InvalidArgument(f"a key is a str, got {type(key).__name__}")
    return RecordRef(_NAMESPACE, ChunkKey(hashlib.sha256(key.encode(errors="surrogatepass")).digest()), 0)
