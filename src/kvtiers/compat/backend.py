"""The contract of an LMCache-compatible storage backend: async, `str` keys, bytes. `BackendStore` makes a tier of the cache of any."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtiers.stores.base import RecordStore
    from kvtiers.stores.registry import RemoteSettings


class StorageBackend(ABC):
    """Keeps bytes under keys. What it raises counts as a failure of that one call, never as an answer."""

    @abstractmethod
    async def write(self, key: str, data: bytes) -> bool:
        """Store, replacing what the key had, so that a reader sees all of it or nothing. False: refused."""

    @abstractmethod
    async def read(self, key: str) -> bytes | None:
        """What was written, or None."""

    @abstractmethod
    async def delete(self, key: str) -> bool:
        """Remove; False if it was not there."""

    @abstractmethod
    async def exists(self, key: str) -> bool:
        """Whether `read` would find it, as far as is known."""

    def as_record_store(self, settings: RemoteSettings) -> RecordStore:
        """The remote tier of a cache that has `storage.remote.backend: package.module:Class`. The class is made with those settings."""
        from kvtiers.compat.backend_store import BackendStore

        return BackendStore(
            self,
            name="remote",
            codec=settings.codec,
            timeout_s=settings.timeout_s,
            connections=settings.connection_pool_size,
        )


class LocalBackend(StorageBackend):
    """One of ours: I/O threads may write to it directly, without an event loop and without a copy."""

    @abstractmethod
    def put_now(self, key: str, payload: memoryview, digest: bytes) -> None:
        """Store on the calling thread. `digest`: xxh3-128 of the payload; a reader gets bytes that have it, or nothing.

        Raises StoreError, OutOfMemoryError, PayloadChanged.
        """
