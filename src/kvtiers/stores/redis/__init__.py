"""Records in Redis, Valkey and what speaks their protocol: one server, Sentinel, or a cluster. `redis_store` makes the store."""

from __future__ import annotations

from kvtiers.records.codecs.base import Codec
from kvtiers.stores.base import RecordStore
from kvtiers.stores.pieces import PiecedStore
from kvtiers.stores.redis.settings import RedisSettings, remote_credentials
from kvtiers.stores.redis.values import RedisValues

__all__ = ["RedisSettings", "RedisValues", "redis_store", "remote_credentials"]


def redis_store(settings: RedisSettings, codec: Codec) -> RecordStore:
    """A store, not yet open. `codec`: for new records."""
    return PiecedStore(RedisValues(settings), codec=codec)
