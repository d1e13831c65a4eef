"""The kernel's memory calls that Python lacks, by ctypes, so that the arena needs no extension module.

Why not `mmap.mmap`: it keeps a second file descriptor, holds the GIL while the kernel works (populating or unmapping 100 GB
takes minutes), and unmaps in a forked child as well, where another mapping may have taken the address.

Any thread may call; ctypes releases the GIL during each call. Each raises `OSError` with the kernel's errno.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.syscall.restype = ctypes.c_long

_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_PROT_READ_WRITE: Final = 0x1 | 0x2
_PROT_NONE: Final = 0
_MAP_SHARED: Final = 0x1
_MAP_RESERVED: Final = 0x2 | 0x20 | 0x4000  # MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
_HUGE_BYTES: Final = 2 << 20
_MPOL_PREFERRED: Final = 1
_NODES_PER_WORD: Final = 64
_MBIND: Final = {"x86_64": 237, "aarch64": 235}
_MOVE_PAGES: Final = {"x86_64": 279, "aarch64": 239}


class Advice(IntEnum):
    """`madvise` advice, `include/uapi/asm-generic/mman-common.h`."""

    DONTFORK = 10
    HUGEPAGE = 14
    POPULATE_WRITE = 23  # Linux 5.14; EINVAL before
    COLLAPSE = 25  # Linux 6.1; EINVAL before


def map_shared(fd: int, nbytes: int) -> int:
    """Map `nbytes` of `fd` shared and writable; returns the address.

    A multiple of 2 MiB unless another thread takes it meanwhile: elsewhere the kernel can't use huge pages.
    """
    gap = _mmap(None, nbytes + _HUGE_BYTES, _PROT_NONE, _MAP_RESERVED, -1)
    unmap(gap, nbytes + _HUGE_BYTES)
    return _mmap(-(-gap // _HUGE_BYTES) * _HUGE_BYTES, nbytes, _PROT_READ_WRITE, _MAP_SHARED, fd)


def _mmap(hint: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    address = _libc.mmap(hint, nbytes, protection, flags, fd, 0)
    if address is None or address == _MAP_FAILED:
        raise _last_error(f"mmap of {nbytes} bytes")
    return int(address)


def unmap(address: int, nbytes: int) -> None:
    """Undo `map_shared`. Nobody may touch the range afterwards."""
    _check(_libc.munmap(address, nbytes), "munmap")


def advise(address: int, nbytes: int, advice: Advice) -> None:
    """`madvise`; POPULATE_WRITE returns when every page of the range exists, COLLAPSE when they are huge ones."""
    _check(_libc.madvise(address, nbytes, int(advice)), f"madvise {advice.name}")


def lock(address: int, nbytes: int) -> None:
    """Keep the range in memory. ENOMEM or EPERM: `RLIMIT_MEMLOCK` is too small."""
    _check(_libc.mlock(address, nbytes), "mlock")


def unlock(address: int, nbytes: int) -> None:
    """Undo `lock`."""
    _check(_libc.munlock(address, nbytes), "munlock")


def prefer_node(address: int, nbytes: int, node: int) -> None:
    """Pages of the range that don't exist yet come from `node`, and from elsewhere only if it is full.

    Preferred, not bound: where a bound node is full the kernel kills a process, and a far page is still a hit.
    """
    mask = (ctypes.c_ulong * (node // _NODES_PER_WORD + 1))()
    mask[node // _NODES_PER_WORD] = 1 << (node % _NODES_PER_WORD)
    arguments = (
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_int(_MPOL_PREFERRED),
        mask,
        ctypes.c_ulong(len(mask) * _NODES_PER_WORD + 1),  # the kernel reads one bit less than it is told
        ctypes.c_uint(0),
    )
    _check(_libc.syscall(_number(_MBIND, "mbind"), *arguments), f"mbind to node {node}")


def nodes_of_pages(addresses: Sequence[int]) -> list[int]:
    """The NUMA node each page lies on; negative (an errno) where it isn't known."""
    count = len(addresses)
    pages = (ctypes.c_void_p * count)(*addresses)
    status = (ctypes.c_int * count)()
    number = _number(_MOVE_PAGES, "move_pages")
    _check(_libc.syscall(number, 0, ctypes.c_ulong(count), pages, None, status, 0), "move_pages")
    return list(status)


def _number(table: dict[str, int], name: str) -> int:
    machine = platform.machine()
    if machine not in table:
        raise OSError(f"{name}: its syscall number on {machine} isn't known here")
    return table[machine]


def _check(result: int, what: str) -> None:
    if result != 0:
        raise _last_error(what)


def _last_error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")
