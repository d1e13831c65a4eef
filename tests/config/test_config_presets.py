"""The four presets: they fit the machine they are scaled to, never go beyond what is described, and say what they don't have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.config import CacheConfig, Fitted, Machine, PathSpace, fit
from kvtiers.config.presets import DISK_PATHS, PATTERNS, described, machine_for_preset, scaled
from kvtiers.config.sizes import GIB, MIB, TIB
from kvtiers.model.errors import DoesNotFit

NAMES = tuple(PATTERNS)
WITH_DISK = tuple(name for name in NAMES if name != "aggressive")


def machine(total: int, available: int, free: int, *, own: int = 0, problem: str = "") -> Machine:
    space = PathSpace(Path("/d"), device=1, total=2 * free, free=free, own=own, problem=problem)
    return Machine(total, available, "a test", paths=(space,))


LAPTOP = machine(4 * GIB, 2 * GIB, 20 * GIB)
WORKSTATION = machine(24 * GIB, 22 * GIB, 70 * GIB)
SERVER = machine(512 * GIB, 500 * GIB, 5 * TIB)
BEYOND = machine(2 * TIB, 2 * TIB - 8 * GIB, 40 * TIB)


def read(text: str) -> CacheConfig:
    return CacheConfig.from_text(text, environ={})


def fitted(name: str, on: Machine) -> Fitted:
    return fit(read(scaled(name, on)), on)


def test_there_are_the_four_patterns() -> None:
    assert NAMES == ("aggressive", "long-document", "shared", "cost-first")


@pytest.mark.parametrize(
    ("name", "cpu", "disk"),
    [
        ("aggressive", 200 * GIB, None),
        ("long-document", 200 * GIB, 5 * TIB),
        ("shared", 100 * GIB, TIB),
        ("cost-first", 50 * GIB, 10 * TIB),
    ],
)
def test_as_described_has_the_sizes_of_the_description(name: str, cpu: int, disk: int | None) -> None:
    storage = read(described(name)).storage
    assert storage.cpu.buffer_size == cpu
    assert storage.disk.enabled is (disk is not None)
    if disk is not None:
        assert (storage.disk.max_size, storage.disk.path) == (disk, (DISK_PATHS[0],))
    assert storage.gpu.max_utilization == 0.80
    assert storage.gpu.capacity == {
        "long-document": 80 * GIB,
        "shared": 80 * GIB,
        "cost-first": 40 * GIB,
    }.get(name)
    assert storage.disk.compression == ("zstd" if name in {"long-document", "cost-first"} else "none")
    backends = {"shared": (True, "mooncake"), "cost-first": (True, "s3")}
    assert (storage.remote.enabled, storage.remote.backend) == backends.get(name, (False, None))


@pytest.mark.parametrize(
    ("name", "on", "cpu", "disk"),
    [
        ("aggressive", LAPTOP, 1280 * MIB, 0),
        ("long-document", LAPTOP, 1280 * MIB, 9 * GIB),
        ("shared", LAPTOP, 1 * GIB, 4608 * MIB),
        ("cost-first", LAPTOP, 512 * MIB, 14 * GIB),
        ("aggressive", WORKSTATION, 12 * GIB, 0),
        ("long-document", WORKSTATION, 12 * GIB, 32 * GIB),
        ("shared", WORKSTATION, 6 * GIB, 16 * GIB),
        ("cost-first", WORKSTATION, 3 * GIB, 48 * GIB),
        ("aggressive", SERVER, 200 * GIB, 0),
        ("long-document", SERVER, 200 * GIB, 2304 * GIB),
        ("shared", SERVER, 100 * GIB, 1 * TIB),
        ("cost-first", SERVER, 50 * GIB, 3584 * GIB),
    ],
)
def test_sizes_follow_the_machine(name: str, on: Machine, cpu: int, disk: int) -> None:
    sizes = fitted(name, on)
    assert (sizes.cpu_bytes, sizes.disk_bytes, sizes.gpu) == (cpu, disk, None)


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_that_is_larger_gets_what_is_described(name: str) -> None:
    here, there = read(scaled(name, BEYOND)).storage, read(described(name)).storage
    assert here.cpu == there.cpu
    assert (here.disk.max_size, here.remote) == (there.disk.max_size, there.remote)
    assert "has room for more" in scaled(name, BEYOND)


@given(
    name=st.sampled_from(NAMES),
    total=st.integers(2 * GIB, 4 * TIB),
    taken=st.floats(0, 0.6),
    free=st.integers(2 * GIB, 50 * TIB),
    own=st.integers(0, TIB),
)
def test_what_is_written_fits_has_its_bounds_and_is_the_same_again(
    name: str, total: int, taken: float, free: int, own: int
) -> None:
    on = machine(total, int(total * (1 - taken)), free, own=own)
    text = scaled(name, on)
    assert text == scaled(name, on)
    sizes, most = fit(read(text), on), read(described(name)).storage
    assert isinstance(most.cpu.buffer_size, int)
    assert 64 * MIB <= sizes.cpu_bytes <= min(most.cpu.buffer_size, on.memory_available * 3 // 4)
    if most.disk.enabled:
        assert isinstance(most.disk.max_size, int)
        assert 0 < sizes.disk_bytes <= min(most.disk.max_size, free + own - GIB)


def test_small_changes_of_what_is_free_do_not_change_the_sizes() -> None:
    later = replace(WORKSTATION, memory_available=20 * GIB)
    assert scaled("aggressive", later) == scaled("aggressive", WORKSTATION)
    moved = machine(24 * GIB, 22 * GIB, 70 * GIB - 300 * MIB)
    assert read(scaled("shared", moved)) == read(scaled("shared", WORKSTATION))


@pytest.mark.parametrize("name", NAMES)
def test_it_also_fits_when_a_tenth_of_the_memory_is_taken_meanwhile(name: str) -> None:
    config = read(scaled(name, WORKSTATION))
    fit(config, replace(WORKSTATION, memory_available=WORKSTATION.memory_available * 9 // 10))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "write", [described, lambda name: scaled(name, WORKSTATION)], ids=["described", "scaled"]
)
def test_every_size_and_choice_stands_under_a_comment(name: str, write: Callable[[str], str]) -> None:
    lines = write(name).splitlines()
    for key in ("max_utilization", "buffer_size", "eviction_policy", "max_size", "compression", "endpoint"):
        for number, line in enumerate(lines):
            if line.strip().startswith(f"{key}:"):
                assert lines[number - 1].strip().startswith("# "), line
    assert all(len(line) <= 115 for line in lines)


@pytest.mark.parametrize("name", ["shared", "cost-first"])
def test_a_pattern_that_needs_a_remote_says_what_to_install(name: str) -> None:
    for text in (described(name), scaled(name, WORKSTATION)):
        before, _, _ = text.partition("enabled: true\n    backend:")
        assert "pip install 'kvtiers[" in " ".join(before.split())


@pytest.mark.parametrize("name", WITH_DISK)
def test_without_a_gpu_no_pool_is_asked_for_but_it_is_shown(name: str) -> None:
    text = scaled(name, WORKSTATION)
    assert read(text).storage.gpu.capacity is None
    assert '    # capacity: "' in text


def test_a_machine_that_is_too_small_is_told_so_with_numbers() -> None:
    with pytest.raises(DoesNotFit) as caught:
        scaled("shared", machine(1 * GIB, 300 * MIB, 1 * GIB))
    cpu, disk = caught.value.problems
    assert "300 MiB of memory are available" in cpu
    assert "1 GiB are free in /d" in disk
    assert "--path" in disk


def test_a_path_that_cannot_be_used_is_told_and_aggressive_needs_none() -> None:
    on = machine(24 * GIB, 22 * GIB, 0, problem="can't be written by user 1000")
    with pytest.raises(DoesNotFit, match="/d can't be written by user 1000; choose another with --path"):
        scaled("long-document", on)
    assert fitted("aggressive", on).disk is None


@pytest.mark.parametrize("name", ["it's", 'a "b" #c', "ключ: [x]", "a\nb", "back\\slash"])
def test_any_path_is_written_so_that_it_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    on = machine_for_preset("shared", str(path))
    assert read(scaled("shared", on)).storage.disk.path == (str(path),)
    assert read(described("shared", str(path))).storage.disk.path == (str(path),)


@pytest.mark.parametrize("name", NAMES)
def test_on_this_machine_it_fits(name: str, tmp_path: Path) -> None:
    on = machine_for_preset(name, str(tmp_path))
    fit(read(scaled(name, on)))


def test_the_default_path_is_the_first_that_can_be_used() -> None:
    usable = [path for path in DISK_PATHS if not PathSpace.probe(path, count_own=False).problem]
    (space,) = machine_for_preset("shared").paths
    assert space.path == Path((usable or DISK_PATHS)[0]).expanduser()


@pytest.mark.parametrize("name", NAMES)
def test_plain_yaml_readers_read_it_too(name: str) -> None:
    tree = yaml.safe_load(described(name))
    assert list(tree) == ["storage", "async", "observability"]
    assert list(tree["storage"]) == ["gpu", "cpu", "disk", "remote"]
