"""Which NUMA nodes have memory, how the arena is split over them, and where its pages really lie.

Binding is best effort: what the kernel refuses (a container's seccomp filter, a node outside the cpuset) becomes a note, never a
failed start. Called by the thread that makes the arena; `segment_near` by whoever opens a session.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from kvtiers.memory import syscalls
from kvtiers.model.layout import PAGE_BYTES

_SYS: Final = Path("/sys")
_PROC: Final = Path("/proc")
_SAMPLED_PAGES: Final = 64


class Numa(Enum):
    """How the arena relates to NUMA nodes."""

    OFF = "off"  # one segment, pages from wherever the kernel takes them
    PER_NODE = "per_node"  # one segment per node, of equal size


class Segment(NamedTuple):
    """A range of the arena and the node its pages were asked from (None: any)."""

    node: int | None
    offset: int
    nbytes: int


def memory_nodes(sysfs: Path = _SYS, proc: Path = _PROC) -> tuple[int, ...]:
    """Nodes that have memory and that this process may use, ascending; empty where the kernel knows no NUMA."""
    nodes = sysfs / "devices" / "system" / "node"
    present = _node_list(nodes / "has_memory") or _node_list(nodes / "online")
    allowed: set[int] = present
    for line in _read(proc / "self" / "status").splitlines():
        if line.startswith("Mems_allowed_list:"):
            allowed = parse_node_list(line.partition(":")[2])
    return tuple(sorted(present & allowed))


def parse_node_list(text: str) -> set[int]:
    """`"0-2,5"` → {0, 1, 2, 5}, the kernel's list format."""
    nodes: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.strip().partition("-")
        if first.isdigit():
            nodes.update(range(int(first), int(last if dash else first) + 1))
    return nodes


def plan_segments(nbytes: int, nodes: Sequence[int], unit: int) -> tuple[Segment, ...]:
    """Split `nbytes` over `nodes` in multiples of `unit` (the last one takes the rest); fewer segments if there isn't enough."""
    if len(nodes) <= 1:
        return (Segment(nodes[0] if nodes else None, 0, nbytes),)
    share = nbytes // len(nodes) // unit * unit
    if share == 0:
        return (Segment(nodes[0], 0, nbytes),)
    starts = [index * share for index in range(len(nodes))]
    ends = [*starts[1:], nbytes]
    return tuple(
        Segment(node, start, end - start) for node, start, end in zip(nodes, starts, ends, strict=True)
    )


def segment_near(segments: Sequence[Segment], pid: int = 0, sysfs: Path = _SYS) -> int | None:
    """The number of the segment on the node that process `pid` (0: this one) runs on; None if it may run on several, or nobody knows."""
    if len(segments) <= 1:
        return None
    try:
        cpus = os.sched_getaffinity(pid)
    except OSError:  # it has ended
        return None
    for number, segment in enumerate(segments):
        if segment.node is not None:
            there = _node_list(sysfs / "devices" / "system" / "node" / f"node{segment.node}" / "cpulist")
            if cpus <= there:
                return number
    return None


def borders(segments: Sequence[Segment], capacity: int) -> tuple[int, ...]:
    """Where segments end in a memory of `capacity` bytes, ascending, the last at its end; () for one segment."""
    ends = [min(one.offset + one.nbytes, capacity) for one in segments]
    return tuple(sorted({*ends, capacity})) if len(ends) > 1 else ()


def bind(address: int, segments: Sequence[Segment]) -> list[str]:
    """Ask for each segment's pages from its node, before they exist. Returns a note for each that was refused."""
    notes = []
    for segment in segments:
        if segment.node is None:
            continue
        try:
            syscalls.prefer_node(address + segment.offset, segment.nbytes, segment.node)
        except OSError as error:
            notes.append(f"segment of node {segment.node} is not bound: {error}")
    return notes


def misplaced(address: int, segments: Sequence[Segment]) -> list[str]:
    """A note for each segment with pages elsewhere, by a sample of 64; none where the kernel doesn't tell."""
    notes = []
    for segment in segments:
        pages = segment.nbytes // PAGE_BYTES
        step = max(1, pages // _SAMPLED_PAGES)
        sample = [address + segment.offset + page * PAGE_BYTES for page in range(0, pages, step)][
            :_SAMPLED_PAGES
        ]
        try:
            elsewhere = [
                node for node in syscalls.nodes_of_pages(sample) if node >= 0 and node != segment.node
            ]
        except OSError:
            continue
        if elsewhere:
            notes.append(
                f"{len(elsewhere) / len(sample):.0%} of the segment of node {segment.node} lies on other nodes"
            )
    return notes


def _node_list(path: Path) -> set[int]:
    return parse_node_list(_read(path))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
