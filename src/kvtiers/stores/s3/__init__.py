"""The `s3` backend of the remote tier: one object a record, in any S3-compatible store; `gs://` and `az://` by the same client.

`store.py` is the store, `client.py` what the client is made with, `failures.py` what its errors mean.
"""

from __future__ import annotations

from kvtiers.records.codecs.base import Codec
from kvtiers.stores.base import RecordStore
from kvtiers.stores.s3.settings import S3Settings
from kvtiers.stores.s3.store import S3Store

__all__ = ["S3Settings", "S3Store", "s3_store"]


def s3_store(settings: S3Settings, codec: Codec) -> RecordStore:
    """The `s3` backend."""
    return S3Store(settings, codec)
