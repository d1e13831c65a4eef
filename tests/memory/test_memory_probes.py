from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.memory import numa, pages, syscalls
from kvtiers.memory.available import available_memory
from kvtiers.memory.mapping import SealedMapping

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    root = tmp_path / "proc"
    (root / "self").mkdir(parents=True)
    (root / "meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemAvailable: {32 << 20} kB\n")
    (root / "self" / "cgroup").write_text("")
    return root


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_this_machine_has_some_memory_but_not_an_exbibyte() -> None:
    available, bound_by = available_memory()
    assert 0 < available < 1 << 60
    assert bound_by


def test_without_groups_the_machine_bounds(proc: Path, tmp_path: Path) -> None:
    assert available_memory(proc, tmp_path / "none") == (32 * GIB, f"MemAvailable in {proc}/meminfo")


def test_nothing_readable_means_nothing_is_available(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "no", tmp_path / "none").nbytes == 0


def test_v2_group_bounds_and_its_file_cache_counts_as_free(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/pod/box\n")
    group = tmp_path / "cg" / "pod" / "box"
    write(group, memory__max=8 * GIB, memory__high="max", memory__current=5 * GIB)
    write(group, memory__stat=f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file 7")
    assert available_memory(proc, tmp_path / "cg") == (5 * GIB, f"{group}/memory.max")


def test_tightest_ancestor_and_memory_high_bound(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/pod/box\n")
    root = tmp_path / "cg"
    write(root / "pod" / "box", memory__max="max", memory__high="max", memory__current=GIB)
    write(root / "pod", memory__max=16 * GIB, memory__high=3 * GIB, memory__current=GIB)
    assert available_memory(proc, root) == (2 * GIB, f"{root}/pod/memory.high")


def test_group_over_its_limit_leaves_nothing_rather_than_a_negative_number(
    proc: Path, tmp_path: Path
) -> None:
    (proc / "self" / "cgroup").write_text("0::/\n")
    write(tmp_path / "cg", memory__max=GIB, memory__current=2 * GIB)
    assert available_memory(proc, tmp_path / "cg").nbytes == 0


def test_v1_group_bounds_and_its_no_limit_is_none(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/job\n")
    group = tmp_path / "cg" / "memory" / "job"
    write(group, memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=GIB)
    assert available_memory(proc, tmp_path / "cg").nbytes == 32 * GIB
    write(group, memory__limit_in_bytes=4 * GIB, memory__stat=f"inactive_file 1\ntotal_inactive_file {GIB}")
    assert available_memory(proc, tmp_path / "cg") == (4 * GIB, f"{group}/memory.limit_in_bytes")


def test_in_a_container_the_path_is_the_hosts_and_the_mount_is_the_group(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/../../kubepods/pod9/abc\n")
    write(tmp_path / "cg", memory__max=2 * GIB, memory__current=0)
    assert available_memory(proc, tmp_path / "cg").nbytes == 2 * GIB


def test_observe_adds_up_the_areas_of_one_mapping_only(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    area = "KernelPageSize:        4 kB\nRss: {rss} kB\nShmemPmdMapped: {huge} kB\nLocked: {locked} kB\nVmFlags: rd wr\n"
    smaps.write_text(
        "0fe00000-10000000 rw-s 00000000 00:01 7    /memfd:other (deleted)\n"
        + area.format(rss=2048, huge=2048, locked=0)
        + "10000000-10200000 rw-s 00000000 00:01 9    /memfd:kvtiers-arena (deleted)\n"
        + area.format(rss=2048, huge=2048, locked=8)
        + "10200000-10400000 rw-s 00200000 00:01 9    /memfd:kvtiers-arena (deleted)\n"
        + area.format(rss=1024, huge=0, locked=0)
    )
    assert pages.observe(0x10000000, 0x400000, smaps) == (4096, 2 * MIB, 3 * MIB, 8192)
    assert pages.observe(0x10000000, 0x200000, smaps).page_bytes == pages.huge_page_bytes()


def test_observe_sees_reserved_pages(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_text(
        "10000000-10400000 rw-s 00000000 00:0f 9    /memfd:kvtiers-arena (deleted)\n"
        "Size: 4096 kB\nKernelPageSize:     2048 kB\nRss:  0 kB\nPrivate_Hugetlb:    4096 kB\nLocked: 0 kB\n"
    )
    assert pages.observe(0x10000000, 4 * MIB, smaps) == (2 * MIB, 4 * MIB, 4 * MIB, 0)


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ("always within_size advise [never] deny force", "set it to 'advise'"),
        ("always [advise] never", "fragmented"),
    ],
)
def test_missing_huge_pages_are_explained(tmp_path: Path, setting: str, advice: str) -> None:
    path = tmp_path / "shmem_enabled"
    path.write_text(setting)
    assert advice in pages.why_no_huge_pages(path)
    assert "no transparent huge pages" in pages.why_no_huge_pages(tmp_path / "gone")


@pytest.mark.parametrize(
    ("text", "nodes"),
    [("0\n", {0}), ("0-3", {0, 1, 2, 3}), ("0,2-3,9", {0, 2, 3, 9}), ("", set()), ("\n", set())],
)
def test_node_lists_are_read(text: str, nodes: set[int]) -> None:
    assert numa.parse_node_list(text) == nodes


def test_nodes_with_memory_within_the_cpuset_count(proc: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sys" / "devices" / "system" / "node"
    write(folder, has_memory="0-2", online="0-3")
    assert numa.memory_nodes(tmp_path / "sys", proc) == (0, 1, 2)
    (proc / "self" / "status").write_text("Name:\tx\nMems_allowed_list:\t1-7\n")
    assert numa.memory_nodes(tmp_path / "sys", proc) == (1, 2)
    assert numa.memory_nodes(tmp_path / "nowhere", proc) == ()


@given(
    pages_=st.integers(1, 5000),
    nodes=st.lists(st.integers(0, 63), max_size=9, unique=True),
    unit=st.sampled_from([4096, 2 * MIB]),
)
def test_segments_tile_the_arena_in_units(pages_: int, nodes: list[int], unit: int) -> None:
    nbytes = pages_ * 4096
    segments = numa.plan_segments(nbytes, nodes, unit)
    assert segments[0].offset == 0
    assert all(left.offset + left.nbytes == right.offset for left, right in pairwise(segments))
    assert segments[-1].offset + segments[-1].nbytes == nbytes
    assert all(segment.nbytes > 0 and segment.offset % unit == 0 for segment in segments)
    assert all(segment.node in nodes if nodes else segment.node is None for segment in segments)


def test_pages_asked_from_a_node_lie_there() -> None:
    nodes = numa.memory_nodes()
    if not nodes:
        pytest.skip("this kernel knows no NUMA")
    mapping = SealedMapping(MIB)
    segment = numa.Segment(nodes[-1], 0, MIB)
    try:
        notes = numa.bind(mapping.address, [segment])
        if notes:
            pytest.skip(f"a sandbox forbids mbind: {notes}")
        np.copyto(mapping.memory, np.uint8(1))
        assert syscalls.nodes_of_pages([mapping.address]) == [nodes[-1]]
        assert numa.misplaced(mapping.address, [segment]) == []
        elsewhere = numa.Segment(nodes[-1] + 1, 0, MIB)
        assert numa.misplaced(mapping.address, [elsewhere]) == [
            f"100% of the segment of node {elsewhere.node} lies on other nodes"
        ]
    finally:
        mapping.close()


def test_each_segment_s_node_stands_in_numa_maps() -> None:
    nodes, maps = numa.memory_nodes(), Path("/proc/self/numa_maps")
    if not nodes or not maps.exists():
        pytest.skip("this kernel knows no NUMA")
    mapping = SealedMapping(4 * MIB)
    segments = numa.plan_segments(mapping.nbytes, nodes, MIB)
    try:
        notes = numa.bind(mapping.address, segments)
        if notes:
            pytest.skip(f"a sandbox forbids mbind: {notes}")
        np.copyto(mapping.memory, np.uint8(1))
        policies = {int(line.split()[0], 16): line.split()[1] for line in maps.read_text().splitlines()}
        for segment in segments:
            begin = max(start for start in policies if start <= mapping.address + segment.offset)
            assert begin >= mapping.address, "the mapping has a line of its own"
            assert policies[begin] == f"prefer:{segment.node}"
    finally:
        mapping.close()
