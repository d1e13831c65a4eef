"""Does it fit this machine? With numbers, and the override that would."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.config import CacheConfig, Machine, PathSpace, fit
from kvtiers.config.fit import TierSize
from kvtiers.config.sizes import GIB, MIB
from kvtiers.model.errors import ConfigError, DoesNotFit


def machine(available: int = 20 * GIB, **more: Any) -> Machine:
    return Machine(memory_total=24 * GIB, memory_available=available, memory_bound_by="a test", **more)


def disk(
    path: str = "/d", *, free: int = 100 * GIB, own: int = 0, device: int = 1, problem: str = ""
) -> PathSpace:
    return PathSpace(Path(path), device=device, total=500 * GIB, free=free, own=own, problem=problem)


def config(storage: dict[str, Any], **environ: str) -> CacheConfig:
    return CacheConfig.from_mapping({"storage": storage}, environ=environ)


def problems(storage: dict[str, Any], on: Machine) -> list[str]:
    with pytest.raises(DoesNotFit) as caught:
        fit(config(storage), on)
    assert isinstance(caught.value, ConfigError)
    return list(caught.value.problems)


def override_in(problem: str) -> dict[str, str]:
    found = re.search(r"(KVTIERS_\w+)=(\S+)", problem)
    assert found, problem
    return {found[1]: found[2]}


def test_more_memory_than_there_is_is_refused_with_the_numbers_and_an_override_that_fits() -> None:
    storage = {"cpu": {"buffer_size": "200Gi"}}
    (problem,) = problems(storage, machine())
    assert "storage.cpu.buffer_size = 200Gi" in problem
    assert "24 GiB of memory" in problem
    assert "20 GiB of it available" in problem
    assert fit(config(storage, **override_in(problem)), machine()).cpu_bytes == 14 * GIB


def test_all_that_does_not_fit_is_in_one_error() -> None:
    storage = {
        "cpu": {"buffer_size": "200Gi"},
        "gpu": {"capacity": "80Gi"},
        "disk": {"enabled": True, "path": "/d", "max_size": "2Ti"},
    }
    found = problems(storage, machine(gpu_free=40 * GIB, paths=(disk(),)))
    assert [one.split(" = ")[0] for one in found] == [
        "storage.cpu.buffer_size",
        "storage.gpu.capacity",
        "storage.disk.max_size",
    ]
    overrides = {name: value for one in found for name, value in override_in(one).items()}
    fitted = fit(config(storage, **overrides), machine(gpu_free=40 * GIB, paths=(disk(),)))
    assert (fitted.gpu_bytes, fitted.disk_bytes) == (24 * GIB, 74 * GIB)


@pytest.mark.parametrize(
    ("available", "nbytes"),
    [
        (20 * GIB, 5 * GIB),
        (200 * GIB, 8 * GIB),
        (32 * GIB + 5, 8 * GIB),
        (400 * MIB, 100 * MIB),
        (330 * MIB, 74 * MIB),  # a quarter would leave less than 256 MiB for everything else
        (320 * MIB, 64 * MIB),
    ],
)
def test_auto_is_a_quarter_of_what_is_available_within_bounds(available: int, nbytes: int) -> None:
    assert fit(config({}), machine(available)).cpu_bytes == nbytes


def test_less_than_the_smallest_arena_is_refused() -> None:
    (problem,) = problems({}, machine(319 * MIB))
    assert "storage.cpu.buffer_size = auto (default)" in problem
    (problem,) = problems({}, machine(200 * MIB))
    assert "Free memory" in problem


def test_thresholds_become_bytes() -> None:
    fitted = fit(config({"cpu": {"buffer_size": "1000Mi"}, "gpu": {"capacity": "1000Mi"}}), machine())
    assert fitted.cpu == TierSize(1000 * MIB, 900 * MIB, 850 * MIB)
    assert fitted.gpu == TierSize(800 * MIB, 750 * MIB, 700 * MIB, whole=1000 * MIB)
    assert fitted.gpu_bytes == 800 * MIB
    assert (fitted.disk, fitted.disk_bytes, fitted.disk_paths) == (None, 0, ())


def test_a_disabled_cpu_tier_keeps_a_small_arena_for_staging() -> None:
    fitted = fit(config({"cpu": {"enabled": False, "buffer_size": "200Gi"}}), machine())
    assert fitted.cpu == TierSize(256 * MIB, 0, 0)
    assert fit(config({"cpu": {"enabled": False, "buffer_size": "8Mi"}}), machine()).cpu_bytes == 8 * MIB


def test_reserved_huge_pages_are_room_of_their_own() -> None:
    storage = {"cpu": {"buffer_size": "30Gi", "huge_pages": "hugetlb"}}
    assert fit(config(storage), machine(hugetlb_free=30 * GIB)).cpu_bytes == 30 * GIB
    assert problems(storage, machine(hugetlb_free=29 * GIB))
    assert problems({"cpu": {"buffer_size": "30Gi"}}, machine(hugetlb_free=30 * GIB))


def test_a_simulated_gpu_pool_shares_host_memory_with_the_arena() -> None:
    storage = {"cpu": {"buffer_size": "10Gi"}, "gpu": {"device": "cpu", "capacity": "20Gi"}}
    (problem,) = problems(storage, machine())
    assert "simulated" in problem
    fit(config(storage, **override_in(problem)), machine())
    assert (
        fit(config({**storage, "gpu": {"device": "cuda", "capacity": "20Gi"}}), machine()).gpu_bytes
        == 16 * GIB
    )


def test_files_of_an_earlier_run_count_as_the_caches_own_room() -> None:
    storage = {"disk": {"enabled": True, "path": "/d", "max_size": "50Gi"}}
    (problem,) = problems(storage, machine(paths=(disk(free=20 * GIB),)))
    assert "20 GiB free" in problem
    assert fit(config(storage), machine(paths=(disk(free=20 * GIB, own=30 * GIB),))).disk_bytes == 50 * GIB


def test_auto_disk_is_half_of_the_room_and_the_same_after_a_restart() -> None:
    storage = {"disk": {"enabled": True, "path": "/d"}}
    before = fit(config(storage), machine(paths=(disk(free=100 * GIB),)))
    after = fit(config(storage), machine(paths=(disk(free=70 * GIB, own=30 * GIB),)))
    assert before.disk_bytes == after.disk_bytes == 50 * GIB
    assert before.disk_paths == (Path("/d"),)
    (problem,) = problems(storage, machine(paths=(disk(free=GIB),)))
    assert "min_free_space" in problem


def test_paths_on_one_file_system_share_its_room() -> None:
    storage = {"disk": {"enabled": True, "path": ["/a", "/b"], "max_size": "150Gi"}}
    assert problems(storage, machine(paths=(disk("/a"), disk("/b"))))
    assert fit(config(storage), machine(paths=(disk("/a"), disk("/b", device=2)))).disk_bytes == 150 * GIB


def test_a_path_that_can_not_be_used_is_refused_with_the_reason() -> None:
    storage = {"disk": {"enabled": True, "path": ["/a", "/b"]}}
    found = problems(
        storage, machine(paths=(disk("/a", problem="is not a directory"), disk("/b", problem="x")))
    )
    assert len(found) == 2
    assert "storage.disk.path = /a" in found[0]
    assert "is not a directory" in found[0]
    assert "KVTIERS_STORAGE__DISK__PATH=" in found[0]


def test_this_machine_can_be_probed_and_nothing_is_made(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "yet"
    found = Machine.probe([missing, tmp_path])
    assert 0 < found.memory_available <= found.memory_total
    assert [space.problem for space in found.paths] == ["", ""]
    assert found.paths[0].path == missing
    assert found.paths[0].device == found.paths[1].device == tmp_path.stat().st_dev
    assert 0 < found.paths[0].free <= found.paths[0].total
    assert not missing.parent.exists()


def test_a_probe_counts_allocated_blocks_of_whatever_lies_there(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.kv").write_bytes(os.urandom(3 * MIB))
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(GIB)
    (tmp_path / "link").symlink_to("/usr")
    own = Machine.probe([tmp_path]).paths[0].own
    assert 3 * MIB <= own < 3 * MIB + 64 * 1024
    assert Machine.probe([tmp_path], count_own=False).paths[0].own == 0


def test_unusable_paths_say_why(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    paths: list[str | Path] = [
        file,
        file / "below",
        tmp_path / "broken",
        tmp_path / ("x" * 300),
        "/proc/kvtiers",
        "~no-such-user-here/x",
    ]
    why = [space.problem for space in Machine.probe(paths).paths]
    assert why[0] == "is not a directory"
    assert why[1] == f"can't be made: {file} is not a directory"
    assert "broken link" in why[2]
    assert all(why)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "can't be written" in Machine.probe([tmp_path / "x"]).paths[0].problem


def test_fitting_without_a_machine_takes_this_one(tmp_path: Path) -> None:
    storage = {
        "cpu": {"buffer_size": "1Mi"},
        "disk": {"enabled": True, "path": str(tmp_path / "kv"), "max_size": "1Mi"},
    }
    fitted = fit(config(storage))
    assert (fitted.cpu_bytes, fitted.disk_bytes, fitted.disk_paths) == (MIB, MIB, (tmp_path / "kv",))
    with pytest.raises(DoesNotFit, match="KVTIERS_STORAGE__CPU__BUFFER_SIZE="):
        fit(config({"cpu": {"buffer_size": "900Ti"}}))


@given(
    available=st.integers(0, 1 << 45),
    buffer=st.integers(MIB, 1 << 45),
    free=st.integers(0, 1 << 50),
    own=st.integers(0, 1 << 50),
    size=st.integers(MIB, 1 << 50),
)
def test_what_is_said_to_fit_fits_and_a_suggestion_is_accepted(
    available: int, buffer: int, free: int, own: int, size: int
) -> None:
    storage = {"cpu": {"buffer_size": buffer}, "disk": {"enabled": True, "path": "/d", "max_size": size}}
    here = machine(available, paths=(disk(free=free, own=own),))
    try:
        fitted = fit(config(storage), here)
    except DoesNotFit as error:
        overrides = {k: v for one in error.problems if "KVTIERS" in one for k, v in override_in(one).items()}
        left = [one for one in error.problems if "KVTIERS" not in one]
        if not left:
            fit(config(storage, **overrides), here)
    else:
        assert 0 < fitted.cpu.low < fitted.cpu.ceiling < fitted.cpu.capacity <= available
        assert fitted.disk_bytes <= free + own
