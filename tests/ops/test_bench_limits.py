"""The limits do the whole of the work they are the limit of; cold reads are cold, or say that they are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvtiers.model.errors import ConfigError, DoesNotFit
from kvtiers.ops.bench.disk_limits import THREADS, DiskLimits
from kvtiers.ops.bench.limits import MemoryLimits, flat, prefaulted
from kvtiers.ops.bench.machine import filesystem_of, machine_report
from kvtiers.ops.bench.page_cache import cold_note, drop_from_page_cache
from kvtiers.ops.bench.settings import check_directory, check_room, make_output, working_directory
from kvtiers.ops.bench.shapes import SHAPES, TINY, shapes_named, synthetic_kv

PIECE = 4096


@pytest.mark.parametrize(
    "name",
    ["copy", "copy_in_pieces", "copy_in_two", "copy_and_sum", "copy_and_sum_in_two", "copy_then_sum_beside"],
)
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_every_copy_copies_every_byte(name: str, pieces: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, pieces * PIECE, dtype=np.uint8)
    target = prefaulted(pieces * PIECE)
    assert target.ctypes.data % 4096 == 0
    with MemoryLimits(PIECE) as limits:
        assert getattr(limits, name)(target, source) > 0.0
    assert np.array_equal(target, source)


@pytest.mark.parametrize("sync", [False, True])
def test_raw_files_are_written_and_read_whole_in_every_way(tmp_path: Path, sync: bool) -> None:
    with DiskLimits(tmp_path / "raw", files=3, record_bytes=8192) as limits:
        ways = 2 if limits.direct else 1
        writers, readers = limits.writers(sync=sync), limits.readers()
        assert len(writers) == len(readers) == ways * len(THREADS)
        written = {file.name: file.read_bytes() for file in sorted((tmp_path / "raw").iterdir())}
        assert [len(content) for content in written.values()] == [8192] * 3
        for turn in (*writers.values(), *readers.values()):
            assert turn() > 0.0
        assert {file.name: file.read_bytes() for file in sorted((tmp_path / "raw").iterdir())} == written, (
            "what was written in a turn is gone after it"
        )
        assert len(limits.warm_shares) == len(readers)


def test_a_raw_file_that_is_short_is_an_error_not_a_fast_read(tmp_path: Path) -> None:
    with DiskLimits(tmp_path / "raw", files=2, record_bytes=8192) as limits:
        (tmp_path / "raw" / "read-1").write_bytes(b"x" * 4096)
        for turn in limits.readers().values():
            with pytest.raises(OSError, match="ends after 4096 of 8192"):
                turn()


def test_files_are_out_of_the_page_cache_after_dropping_them(tmp_path: Path) -> None:
    if filesystem_of(tmp_path) not in {"ext4", "xfs", "btrfs"}:
        pytest.skip("a file system that lives in memory, or that may keep its pages")
    file = tmp_path / "file"
    file.write_bytes(b"x" * (1 << 20))
    assert drop_from_page_cache([file]) == 0.0
    assert drop_from_page_cache([]) == 0.0
    (tmp_path / "empty").touch()
    assert drop_from_page_cache([tmp_path / "empty"]) == 0.0


def test_a_read_that_was_not_cold_says_so() -> None:
    assert cold_note([0.0, 0.005]).startswith("cold reads")
    assert cold_note([0.0, 0.4, 0.1]).startswith("NOT COLD: up to 40%")


class TestSettings:
    def test_shapes_are_those_of_the_models(self) -> None:
        llama, smollm = shapes_named("both")
        assert (llama.chunk_bytes, smollm.chunk_bytes) == (32 << 20, 5_898_240)
        assert llama.chunks == 8
        assert smollm.nbytes <= 256 << 20 < smollm.nbytes + smollm.chunk_bytes
        with pytest.raises(ConfigError, match="gpt-2 is not one of llama3-8b, smollm2-135m, both"):
            shapes_named("gpt-2")

    def test_synthetic_kv_has_the_shape_and_compresses_like_kv(self) -> None:
        from kvtiers.records.codecs.registry import codec_for

        shape = SHAPES["smollm2-135m"]
        kv = synthetic_kv(shape, 2 * shape.chunk_tokens)
        assert kv.shape == shape.layout.shape(2 * shape.chunk_tokens)
        assert not np.array_equal(kv[:, :, : shape.chunk_tokens], kv[:, :, shape.chunk_tokens :])
        chunk = np.ascontiguousarray(kv[:, :, : shape.chunk_tokens]).reshape(-1).view(np.uint8).data
        codec = codec_for("zstd", level=3)
        encoded = np.empty(codec.bound(len(chunk)), np.uint8).data
        assert 0.25 < 1 - codec.encode(chunk, encoded, 2) / len(chunk) < 0.40

    def test_tiny_kv_of_an_odd_length_is_filled(self) -> None:
        shape = SHAPES[TINY]
        assert synthetic_kv(shape, shape.chunk_tokens + 3).any(axis=(0, 1, 3, 4)).all()

    def test_too_little_room_is_refused_with_the_numbers(self, tmp_path: Path) -> None:
        check_room(tmp_path, 0)
        with pytest.raises(DoesNotFit, match=r"free, but this run writes 1 EiB"):
            check_room(tmp_path, 1 << 60)

    def test_a_directory_that_can_not_be_made_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for below in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ConfigError, match="--directory"):
                check_directory(below)
            with pytest.raises(ConfigError, match="--output"):
                make_output(below)
            with pytest.raises(ConfigError, match="--directory"), working_directory(below):
                pass

    def test_the_working_directory_is_gone_afterwards_also_after_an_error(self, tmp_path: Path) -> None:
        def fail() -> None:
            with working_directory(tmp_path / "new") as directory:
                (directory / "file").touch()
                raise RuntimeError("in the middle")

        with pytest.raises(RuntimeError, match="in the middle"):
            fail()
        assert list((tmp_path / "new").iterdir()) == []


def test_the_machine_is_described_without_paths_or_names(tmp_path: Path) -> None:
    report = machine_report(tmp_path)
    assert report.cores >= 1
    assert report.memory_bytes > 1 << 28
    assert report.versions["numpy"] == np.__version__
    assert report.filesystem == filesystem_of(tmp_path)
    text = "\n".join(report.describe())
    assert "load average" in text
    assert str(tmp_path) not in text
    assert filesystem_of(tmp_path / "nonexistent") == "unknown"


def test_flat_is_a_view() -> None:
    array = np.zeros((2, 3), np.uint16)
    flat(array)[:] = 255
    assert (array == 0xFFFF).all()
