"""What pages a mapping really consists of, as the kernel tells in `/proc/self/smaps`.

Needed because advice is not a promise: `madvise(MADV_HUGEPAGE)` on shared memory succeeds and changes nothing where
`/sys/kernel/mm/transparent_hugepage/shmem_enabled` is `never`, its default. Reading smaps walks the page tables: once, at start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from kvtiers.model.layout import PAGE_BYTES

_KIB: Final = 1024
_SMAPS: Final = Path("/proc/self/smaps")
_MEMINFO: Final = Path("/proc/meminfo")
_SHMEM_ENABLED: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_HUGE_SIZE: Final = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_DEFAULT_HUGE_BYTES: Final = 2 << 20
_MAPPED_HUGE: Final = ("ShmemPmdMapped", "FilePmdMapped", "AnonHugePages")


class ObservedPages(NamedTuple):
    """Pages of one mapping. `page_bytes` is the huge size only if every byte is on huge pages; `huge_bytes` has the exact share."""

    page_bytes: int
    huge_bytes: int
    resident_bytes: int
    locked_bytes: int


def observe(address: int, nbytes: int, smaps: Path = _SMAPS) -> ObservedPages:
    """Sum over the mapping's areas (binding and locking may have split it). Raises OSError if smaps can't be read."""
    kernel_page, huge, resident, locked = 0, 0, 0, 0
    inside = False
    with smaps.open() as lines:
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or " " in name:  # "7f1c00000000-7f1c40000000 rw-s …": an area begins
                start, _, end = line.split(maxsplit=1)[0].partition("-")
                inside = address <= int(start, 16) and int(end, 16) <= address + nbytes
            elif inside and value.endswith("kB\n"):
                amount = int(value.split()[0]) * _KIB
                if name == "KernelPageSize":
                    kernel_page = max(kernel_page, amount)
                elif name == "Rss":
                    resident += amount
                elif name == "Locked":
                    locked += amount
                elif name in _MAPPED_HUGE:
                    huge += amount
                elif name in ("Shared_Hugetlb", "Private_Hugetlb"):
                    huge += amount
                    resident += amount
    if kernel_page > PAGE_BYTES:
        return ObservedPages(kernel_page, huge, resident, locked)
    whole = huge >= nbytes
    return ObservedPages(huge_page_bytes() if whole else PAGE_BYTES, huge, resident, locked)


def huge_page_bytes(path: Path = _HUGE_SIZE) -> int:
    """Size of a transparent huge page on this machine."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return _DEFAULT_HUGE_BYTES


def hugetlb_page_bytes(meminfo: Path = _MEMINFO) -> int:
    """Size of the pages that `vm.nr_hugepages` reserves."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) * _KIB
    return _DEFAULT_HUGE_BYTES


def why_no_huge_pages(path: Path = _SHMEM_ENABLED) -> str:
    """What an operator can do when huge pages were advised and not obtained."""
    try:
        setting = path.read_text().strip()
    except OSError:
        return "this kernel has no transparent huge pages for shared memory"
    chosen = setting.partition("[")[2].partition("]")[0]
    if chosen in ("never", "deny"):
        return f"{path} is '{chosen}': set it to 'advise', or reserve pages and use hugetlb"
    return f"{path} is '{chosen}', but memory was too fragmented for more"
