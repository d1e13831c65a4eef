"""What an errno of the file system means to the cache."""

from __future__ import annotations

import errno
from typing import Final

from kvtiers.model.errors import StoreError, StoreFull, StoreTransient, StoreUnavailable

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_BROKEN: Final = frozenset(
    {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN, errno.ENOTCONN}
)
_NOT_OURS: Final = frozenset(
    {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ENODEV}
)


class NotARegularFile(OSError):
    """A directory, FIFO, socket or device lies under a record's name."""


def is_full(error: OSError) -> bool:
    """No space, quota or file size left."""
    return error.errno in _FULL


def is_unreadable(error: OSError) -> bool:
    """The thing under this name can't be opened by us and may not be ours; the disk itself works."""
    return isinstance(error, NotARegularFile) or error.errno in _NOT_OURS


def as_store_error(error: OSError, doing: str) -> StoreError:
    """The store's error for `error`, which happened while `doing`."""
    what = f"{doing}: {error.strerror or error}"
    if is_full(error):
        return StoreFull(f"{what}; free space, or set a smaller capacity")
    if error.errno in _BROKEN:
        return StoreUnavailable(f"{what}; check mount and permissions")
    return StoreTransient(what)
