"""Moving whole pages between files and memory, past the page cache where the file system allows it. Any thread.

O_DIRECT wants addresses, lengths and offsets aligned; how much, `statx` says since Linux 6.1 (STATX_DIOALIGN); before that a
try tells. Records are written and read in pages of 4 KiB, so any alignment up to that will do. Whatever the kernel refuses
later (EINVAL: memory of a caller that isn't aligned, a file of odd length, an old FUSE) is done buffered, on that file only.

No call here blocks on opening: what is not a regular file is left to the caller to refuse (`O_NONBLOCK`, `O_NOFOLLOW`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from typing import Final

from kvtiers.model.layout import PAGE_BYTES

_AT_EMPTY_PATH: Final = 0x1000
_STATX_DIOALIGN: Final = 0x2000
_STATX_BYTES: Final = 256
_DIO_ALIGN: Final = struct.Struct("=II")
_DIO_ALIGN_AT: Final = 0x98  # stx_dio_mem_align, stx_dio_offset_align; include/uapi/linux/stat.h
_READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY
_WRITE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


def open_to_read(path: str, extra_flags: int) -> int:
    """A file descriptor; never blocks. `extra_flags`: os.O_DIRECT or 0."""
    return _open(path, _READ_FLAGS, extra_flags)


def open_new(path: str, extra_flags: int) -> int:
    """Create a file of mode 0600 to write; it must not exist."""
    return _open(path, _WRITE_FLAGS, extra_flags)


def read_from_start(fd: int, buffers: Sequence[memoryview]) -> int:
    """Fill the buffers in order from the file's start; returns bytes read, fewer only at the file's end."""
    pending = list(buffers)
    done = 0
    while pending:
        try:
            count = os.preadv(fd, pending, done)
        except OSError as error:
            if error.errno != errno.EINVAL or not _drop_direct(fd):
                raise
            continue
        if count == 0:
            break
        done += count
        pending = _rest(pending, count)
    return done


def read_ahead(path: str, nbytes: int) -> None:
    """Let the kernel begin to read the file's first bytes into the page cache. What can't be opened, the reader will find out."""
    try:
        fd = open_to_read(path, 0)
    except OSError:
        return
    try:
        os.posix_fadvise(fd, 0, nbytes, os.POSIX_FADV_WILLNEED)
    except OSError:
        pass
    finally:
        os.close(fd)


def let_go_of_pages(fd: int) -> None:
    """What the page cache holds of a file will not be wanted soon."""
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        pass


def write_from_start(fd: int, buffers: Sequence[memoryview]) -> None:
    """Write all buffers in order from the file's start."""
    pending = list(buffers)
    done = 0
    while pending:
        try:
            count = os.pwritev(fd, pending, done)
        except OSError as error:
            if error.errno != errno.EINVAL or not _drop_direct(fd):
                raise
            continue
        if count == 0:
            raise OSError(errno.EIO, "the kernel wrote nothing")
        done += count
        pending = _rest(pending, count)


def direct_flags(fd: int) -> int:
    """os.O_DIRECT if files like this one (opened for writing, empty) offer it at 4 KiB or finer, else 0."""
    alignment = _stated_alignment(fd)
    if alignment is not None:
        memory, offset = alignment
        fits = 0 < memory <= PAGE_BYTES and 0 < offset <= PAGE_BYTES
        return os.O_DIRECT if fits and _set_direct(fd) else 0
    return os.O_DIRECT if _set_direct(fd) and _direct_write_works(fd) else 0


def _open(path: str, flags: int, extra_flags: int) -> int:
    try:
        return os.open(path, flags | extra_flags, 0o600)
    except OSError as error:
        if not extra_flags or error.errno != errno.EINVAL:
            raise
    if flags & os.O_EXCL:  # some file systems create the file before they refuse the flag
        flags &= ~os.O_EXCL
    return os.open(path, flags, 0o600)


def _rest(buffers: list[memoryview], done: int) -> list[memoryview]:
    for index, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[index + 1 :]]
        done -= len(buffer)
    return []


def _drop_direct(fd: int) -> bool:
    """Go on buffered; False if it was buffered already."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not flags & os.O_DIRECT:
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return True


def _set_direct(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def _stated_alignment(fd: int) -> tuple[int, int] | None:
    """Memory and offset alignment as the kernel states them ((0, 0): none offered); None if it doesn't say."""
    try:
        statx = ctypes.CDLL(None, use_errno=True).statx
    except AttributeError:  # glibc before 2.28
        return None
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(fd, b"", _AT_EMPTY_PATH, ctypes.c_uint(_STATX_DIOALIGN), answer) != 0:
        return None
    (mask,) = struct.unpack_from("=I", answer)
    if not mask & _STATX_DIOALIGN:
        return None
    memory, offset = _DIO_ALIGN.unpack_from(answer, _DIO_ALIGN_AT)
    return int(memory), int(offset)


def _direct_write_works(fd: int) -> bool:
    import mmap

    with mmap.mmap(-1, PAGE_BYTES) as page:
        try:
            return os.pwrite(fd, page, 0) == PAGE_BYTES
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
