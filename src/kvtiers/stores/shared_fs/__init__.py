"""The `fs` backend of the remote tier: records as files in a directory that several hosts share, owned by none of them.

`store.py` is the store; the files are the disk tier's, and are read and written by its code.
"""

from __future__ import annotations

from kvtiers.records.codecs.base import Codec
from kvtiers.stores.base import RecordStore
from kvtiers.stores.shared_fs.settings import SharedFsSettings
from kvtiers.stores.shared_fs.store import SharedFsStore

__all__ = ["SharedFsSettings", "SharedFsStore", "shared_fs_store"]


def shared_fs_store(settings: SharedFsSettings, codec: Codec) -> RecordStore:
    """The `fs` backend."""
    return SharedFsStore(settings, codec)
