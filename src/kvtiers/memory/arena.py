"""The one preallocated piece of host memory that is the CPU tier: mapped once, prefaulted, handed out as views.

Invariants
- A view stays valid as long as it exists, whatever happens to the arena: a read that outlived its deadline can never write into
  memory that means something else by then (see `mapping`).
- Refused rather than overcommitted: what is available is checked before, and again at every piece of the prefault.
- The report says what was obtained, not what was asked for.

Threads: one thread makes and closes an arena; `view` and `buffer` may be called by any thread at any time (they read one
attribute and slice it). Who may write where is the core's business: the arena hands out overlapping views if asked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from kvtiers.memory import numa as numa_nodes
from kvtiers.memory import pages, syscalls
from kvtiers.memory.available import available_memory
from kvtiers.memory.mapping import Bytes, CloseOutcome, SealedMapping
from kvtiers.memory.numa import Numa, Segment
from kvtiers.memory.prefault import PIECE_BYTES, Progress, prefault
from kvtiers.model.errors import CacheClosed, DoesNotFit, InvariantBroken
from kvtiers.model.layout import PAGE_BYTES

_MIB: Final = 1 << 20


class HugePages(Enum):
    """Which pages to ask for. What was obtained is in `Arena.report`."""

    OFF = "off"
    ADVISE = "advise"  # transparent ones; the kernel may refuse them
    HUGETLB = "hugetlb"  # reserved by the operator (vm.nr_hugepages); falls back to ADVISE with a note


class LockMemory(Enum):
    """Whether to `mlock` the arena, so that it's never swapped out."""

    OFF = "off"
    WHERE_ALLOWED = "where_allowed"  # a refusal (RLIMIT_MEMLOCK) becomes a note


class ArenaDoesNotFit(DoesNotFit):
    """The machine, or the control group this process runs in, has less memory left than the arena needs."""

    def __init__(
        self,
        problems: Sequence[str],
        *,
        source: str = "arena",
        needed_bytes: int = 0,
        available_bytes: int = 0,
    ) -> None:
        super().__init__(problems, source=source)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


@dataclass(frozen=True, slots=True)
class ArenaReport:
    """What was really obtained."""

    nbytes: int
    page_bytes: int  # the huge size only if all of the arena is on huge pages
    huge_bytes: int
    locked: bool
    prefault_seconds: float
    segments: tuple[Segment, ...]
    notes: tuple[str, ...]


class Arena:
    """`nbytes` of zeroed, prefaulted, page-aligned shared memory."""

    def __init__(
        self,
        nbytes: int,
        *,
        huge_pages: HugePages = HugePages.ADVISE,
        lock_memory: LockMemory = LockMemory.WHERE_ALLOWED,
        numa: Numa = Numa.PER_NODE,
        available_bytes: int | None = None,
        on_progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`nbytes` is rounded up to whole pages. `available_bytes`: what may be taken; None asks the machine.

        Raises ArenaDoesNotFit, or whatever `on_progress` raises (the way to interrupt); nothing is left behind then.
        """
        if nbytes < 1:
            raise InvariantBroken(f"an arena of {nbytes} bytes")
        room = _Room(nbytes, available_bytes)
        notes: list[str] = []
        try:
            mapping, unit = _map(nbytes, huge_pages, room, notes)
            try:
                segments = _bind(mapping, numa, unit, notes)
                started = clock()
                prefault(
                    mapping.memory,
                    pages.huge_page_bytes()
                    if unit == PAGE_BYTES and huge_pages is not HugePages.OFF
                    else None,
                    room.check if unit == PAGE_BYTES else _reserved,
                    on_progress,
                )
                seconds = clock() - started
                if lock_memory is LockMemory.WHERE_ALLOWED and unit == PAGE_BYTES:
                    _lock(mapping, notes)
                self.report: Final = _observe(
                    mapping, unit, huge_pages, segments, seconds=seconds, notes=notes
                )
            except BaseException:
                mapping.close()
                raise
        except OSError as error:
            raise ArenaDoesNotFit(
                [
                    f"the kernel refused {nbytes / _MIB:.0f} MiB: {error}; make the arena smaller or free memory"
                ],
                needed_bytes=nbytes,
            ) from error
        self._mapping: Final = mapping
        self.nbytes: Final = mapping.nbytes

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Ranges by NUMA node, in order, covering the arena; one where there is one node."""
        return self.report.segments

    def view(self, offset: int, nbytes: int) -> Bytes:
        """The bytes `[offset, offset + nbytes)` as they lie there: no copy, writable. `offset` is a multiple of 4 KiB."""
        memory = self._mapping.memory
        if offset % PAGE_BYTES or not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise InvariantBroken(
                f"view of {nbytes} bytes at {offset}: the arena has {self.nbytes}, in 4 KiB pages"
            )
        return memory[offset : offset + nbytes]

    def buffer(self, offset: int, nbytes: int) -> memoryview:
        """`view` as a buffer, for `preadv`, `pwritev` and sockets."""
        return self.view(offset, nbytes).data

    def fileno(self) -> int:
        """The sealed memfd, to be sent to a client."""
        fd = self._mapping.fileno()
        if fd < 0:
            raise CacheClosed("the arena is closed, or belongs to the parent of this forked process")
        return fd

    def close(self) -> CloseOutcome:
        """Give the arena up: unmapped at once if no view is alive, else when the last one goes. Ask again by calling again."""
        return self._mapping.close()

    def leak(self) -> CloseOutcome:
        """Close but keep the mapping as long as the process lives: for memory that a device may still write to."""
        return self._mapping.leak()

    def describe(self) -> str:
        """One line for the log: size, pages, lock, nodes, and what was asked for in vain."""
        report = self.report
        kind = f"{report.page_bytes // 1024} KiB pages"
        if 0 < report.huge_bytes < report.nbytes:
            kind += f" ({report.huge_bytes / report.nbytes:.0%} of it on huge ones)"
        nodes = ",".join(str(segment.node) for segment in report.segments if segment.node is not None)
        parts = [
            f"arena of {report.nbytes / _MIB:.0f} MiB",
            kind,
            "locked" if report.locked else "not locked",
            f"NUMA node {nodes}" if nodes else "NUMA not considered",
            f"prefaulted in {report.prefault_seconds:.2f} s",
            *report.notes,
        ]
        return "; ".join(parts)


class _Room:
    """How much may be taken: a number given, or what the machine says at the time of asking."""

    def __init__(self, needed: int, limit: int | None) -> None:
        self._needed = needed
        self._limit = limit

    def check(self, left: int) -> None:
        """Raise ArenaDoesNotFit unless `left` more bytes fit."""
        if self._limit is not None:
            available, bound_by = self._limit - (self._needed - left), "the limit given"
        else:
            available, bound_by = available_memory()
        if left > available:
            problem = (
                f"{self._needed / _MIB:.0f} MiB asked for, {left / _MIB:.0f} still to be taken, and {available / _MIB:.0f} MiB "
                f"available (by {bound_by}): make the arena smaller or free memory"
            )
            raise ArenaDoesNotFit(
                [problem],
                needed_bytes=self._needed,
                available_bytes=available,
            )


def _reserved(left: int) -> None:
    """Reserved huge pages are not part of the available memory: the kernel's reservation was the check."""


def _map(nbytes: int, huge_pages: HugePages, room: _Room, notes: list[str]) -> tuple[SealedMapping, int]:
    """The mapping and the page size it is made of for certain."""
    if huge_pages is HugePages.HUGETLB:
        unit = pages.hugetlb_page_bytes()
        count = -(-nbytes // unit)
        try:
            return SealedMapping(count * unit, memfd_flags=os.MFD_HUGETLB), unit
        except OSError as error:
            notes.append(f"no reserved huge pages ({error.strerror}): set vm.nr_hugepages to {count} or more")
    room.check(nbytes)
    mapping = SealedMapping(-(-nbytes // PAGE_BYTES) * PAGE_BYTES)
    if huge_pages is not HugePages.OFF:
        try:
            syscalls.advise(mapping.address, mapping.nbytes, syscalls.Advice.HUGEPAGE)
        except OSError as error:
            notes.append(f"huge pages refused: {error}")
    return mapping, PAGE_BYTES


def _bind(mapping: SealedMapping, numa: Numa, unit: int, notes: list[str]) -> tuple[Segment, ...]:
    if numa is Numa.OFF:
        return (Segment(None, 0, mapping.nbytes),)
    segments = numa_nodes.plan_segments(
        mapping.nbytes, numa_nodes.memory_nodes(), max(unit, pages.huge_page_bytes())
    )
    if len(segments) == 1:
        notes.append("one NUMA node: nothing to bind")
    else:
        notes += numa_nodes.bind(mapping.address, segments)
    return segments


def _lock(mapping: SealedMapping, notes: list[str]) -> None:
    try:
        for start in range(0, mapping.nbytes, PIECE_BYTES):  # in pieces, so that signals get their turn
            syscalls.lock(mapping.address + start, min(PIECE_BYTES, mapping.nbytes - start))
    except OSError as error:
        syscalls.unlock(mapping.address, mapping.nbytes)
        notes.append(f"not locked ({error.strerror}): raise RLIMIT_MEMLOCK or grant CAP_IPC_LOCK")


def _observe(
    mapping: SealedMapping,
    unit: int,
    huge_pages: HugePages,
    segments: tuple[Segment, ...],
    *,
    seconds: float,
    notes: list[str],
) -> ArenaReport:
    try:
        observed = pages.observe(mapping.address, mapping.nbytes)
    except OSError as error:
        notes.append(f"pages unknown: {error}")
        observed = pages.ObservedPages(PAGE_BYTES, 0, 0, 0)
    huge = pages.huge_page_bytes()
    if huge_pages is not HugePages.OFF and observed.huge_bytes < mapping.nbytes // huge * huge:
        notes.append(f"huge pages asked for, not all obtained: {pages.why_no_huge_pages()}")
    if len(segments) > 1:
        notes += numa_nodes.misplaced(mapping.address, segments)
    return ArenaReport(
        nbytes=mapping.nbytes,
        page_bytes=observed.page_bytes,
        huge_bytes=observed.huge_bytes,
        locked=unit > PAGE_BYTES or observed.locked_bytes >= mapping.nbytes,  # reserved huge pages never swap
        prefault_seconds=seconds,
        segments=segments,
        notes=tuple(notes),
    )
