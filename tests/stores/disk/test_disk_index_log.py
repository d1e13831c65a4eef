"""The index log: a hint that may lose entries and never invents one."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtiers.model.keys import ChunkKey
from kvtiers.records.header import RecordHeader
from kvtiers.stores.disk.entry import (
    ENTRY_BYTES,
    IDENTITY_BYTES,
    allocated_bytes,
    file_bytes,
    identity_of,
    pack_note,
    pack_put,
    pack_tombstone,
    ref_of,
    stored_record,
    with_allocated,
)
from kvtiers.stores.disk.index_log import IndexLog
from kvtiers.testing.store_kit import NAMESPACE, key_of

MakeLog = Callable[[], IndexLog]


def entry_of(number: int, *, payload_bytes: int = 5000) -> bytes:
    header = RecordHeader(
        namespace=NAMESPACE,
        key=key_of(number),
        parent=key_of(number - 1),
        part=number % 3,
        num_parts=65_536,
        token_start=2**40 + number,
        token_count=2**32 - 1,
        itemsize=2,
        codec="none",
        codec_parameters=b"",
        payload_bytes=payload_bytes,
        stored_bytes=payload_bytes,
        checksum=bytes(16),
        stored_checksum=bytes(16),
    )
    return pack_put(header, allocated_bytes=3 * 4096)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index-v1.log"


@pytest.fixture
def open_log(path: Path, request: pytest.FixtureRequest) -> MakeLog:
    def make() -> IndexLog:
        log = IndexLog(str(path))
        request.addfinalizer(log.close)
        return log

    return make


def test_an_entry_says_all_that_a_stored_record_needs() -> None:
    entry = entry_of(5)
    record = stored_record(entry)
    assert record.ref == (NAMESPACE, key_of(5), 2)
    assert identity_of(record.ref) == entry[:IDENTITY_BYTES]
    assert ref_of(entry) == record.ref
    assert record[1:] == (ChunkKey(key_of(4)), 65_536, 2**40 + 5, 2**32 - 1, 5000, 3 * 4096, b"", b"")
    assert file_bytes(entry) == 4096 + 8192
    larger = with_allocated(entry, 10 * 4096)
    assert allocated_bytes(larger) == 10 * 4096
    assert stored_record(larger)[:6] == record[:6]


def test_what_was_appended_is_loaded(open_log: MakeLog) -> None:
    log = open_log()
    assert log.load().entries == {}
    for number in range(5):
        log.append(entry_of(number))
    log.append(pack_note(12_345))
    log.append(pack_tombstone(entry_of(2)[:IDENTITY_BYTES]))
    log.close()
    loaded = open_log().load()
    assert list(loaded.entries.values()) == [entry_of(number) for number in (0, 1, 3, 4)]
    assert loaded.note == 12_345
    assert loaded.damaged == 0


def test_the_last_entry_of_a_record_wins_and_makes_it_the_most_recent(open_log: MakeLog) -> None:
    log = open_log()
    log.load()
    for entry in (entry_of(1), entry_of(2), entry_of(1, payload_bytes=9000), entry_of(2), entry_of(2)):
        log.append(entry)
    assert list(open_log().load().entries.values()) == [entry_of(1, payload_bytes=9000), entry_of(2)]


@given(flips=st.lists(st.integers(0, 8 * 12 * ENTRY_BYTES - 1), min_size=1, max_size=6))
def test_flipped_bits_lose_their_entries_and_no_others(
    tmp_path_factory: pytest.TempPathFactory, flips: list[int]
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    data = bytearray(b"".join(entry_of(number) for number in range(12)))
    for flip in flips:
        data[flip // 8] ^= 1 << flip % 8
    path.write_bytes(data)
    log = IndexLog(str(path))
    loaded = log.load()
    log.close()
    sound = [n for n in range(12) if data[n * ENTRY_BYTES : (n + 1) * ENTRY_BYTES] == entry_of(n)]
    assert list(loaded.entries.values()) == [entry_of(n) for n in sound]
    assert loaded.damaged == 12 - len(sound)


def test_zeros_and_garbage_are_not_entries(path: Path, open_log: MakeLog) -> None:
    path.write_bytes(bytes(10 * ENTRY_BYTES) + random.Random(1).randbytes(10 * ENTRY_BYTES) + entry_of(1))
    loaded = open_log().load()
    assert list(loaded.entries.values()) == [entry_of(1)]
    assert loaded.damaged == 20


@pytest.mark.parametrize("torn", [1, 67, ENTRY_BYTES - 1])
def test_a_torn_tail_is_skipped_and_overwritten(path: Path, open_log: MakeLog, torn: int) -> None:
    path.write_bytes(entry_of(1) + entry_of(2)[:torn])
    log = open_log()
    loaded = log.load()
    assert list(loaded.entries.values()) == [entry_of(1)]
    assert loaded.damaged == 1
    log.append(entry_of(3))
    log.close()
    loaded = open_log().load()
    assert list(loaded.entries.values()) == [entry_of(1), entry_of(3)]
    assert loaded.damaged == 0


def test_what_a_full_disk_cut_short_does_not_shift_what_follows(
    path: Path, open_log: MakeLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log()
    log.load()
    log.append(entry_of(1))
    whole_write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole_write(fd, data[:50], offset))
    with pytest.raises(OSError, match="no space") as caught:
        log.append(entry_of(2))
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    log.append(entry_of(3))
    log.close()
    loaded = open_log().load()
    assert list(loaded.entries.values()) == [entry_of(1), entry_of(3)]
    assert loaded.damaged == 0


def test_compaction_keeps_what_lives_in_its_order(path: Path, tmp_path: Path, open_log: MakeLog) -> None:
    log = open_log()
    log.load()
    for number in range(300):
        log.append(entry_of(number))
    assert log.compact(str(tmp_path / "temp"), lambda: [entry_of(7), entry_of(3)])
    assert path.stat().st_size == 2 * ENTRY_BYTES
    log.append(entry_of(9))
    log.close()
    assert list(open_log().load().entries.values()) == [entry_of(7), entry_of(3), entry_of(9)]
    assert not (tmp_path / "temp").exists()


def test_what_is_appended_during_a_compaction_survives_it(
    tmp_path: Path, open_log: MakeLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log()
    log.load()
    log.append(entry_of(1))
    sync = os.fdatasync

    def append_then_sync(fd: int) -> None:  # the new file is written by now, and not yet in place
        log.append(entry_of(2))
        log.append(pack_tombstone(entry_of(1)[:IDENTITY_BYTES]))
        assert not log.wants_compaction(live=-10_000)  # one at a time
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", append_then_sync)
    assert log.compact(str(tmp_path / "temp"), lambda: [entry_of(1)])
    monkeypatch.undo()
    log.append(entry_of(3))
    assert list(open_log().load().entries.values()) == [entry_of(2), entry_of(3)]


def test_a_compaction_that_fails_leaves_the_log_as_it_was(
    tmp_path: Path, open_log: MakeLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log()
    log.load()
    for number in range(10_000):
        log.append(entry_of(number % 3))
    assert log.wants_compaction(live=3)

    def no_space(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", no_space)
    with pytest.raises(OSError, match="No space"):
        log.compact(str(tmp_path / "temp"), lambda: [entry_of(1)])
    monkeypatch.undo()
    assert not (tmp_path / "temp").exists()
    assert not log.wants_compaction(live=3)  # not at every append from now on
    log.append(entry_of(5))
    assert set(open_log().load().entries.values()) == {entry_of(n) for n in (0, 1, 2, 5)}
    assert log.compact(str(tmp_path / "temp"), lambda: [entry_of(1)])


def test_a_closed_log_takes_nothing(open_log: MakeLog, tmp_path: Path) -> None:
    log = open_log()
    log.load()
    log.close()
    log.close()
    log.sync()
    with pytest.raises(OSError, match="closed"):
        log.append(entry_of(1))
    assert not log.compact(str(tmp_path / "temp"), list)


def test_its_allocated_size_is_the_files(path: Path, open_log: MakeLog) -> None:
    log = open_log()
    log.load()
    for number in range(200):
        log.append(entry_of(number))
        assert log.allocated_bytes == path.stat().st_blocks * 512


Step = tuple[str, int]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "put", "tombstone", "compact", "reload"]), st.integers(0, 5)),
        max_size=40,
    )
)
def test_it_replays_to_what_a_dictionary_holds(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    directory = tmp_path_factory.mktemp("log")
    log = IndexLog(str(directory / "log"))
    log.load()
    model: dict[bytes, bytes] = {}
    for index, (what, number) in enumerate(steps):
        entry = entry_of(number, payload_bytes=1 + index)
        identity = entry[:IDENTITY_BYTES]
        if what == "put":
            model.pop(identity, None)
            model[identity] = entry
            log.append(entry)
        elif what == "tombstone":
            model.pop(identity, None)
            log.append(pack_tombstone(identity))
        elif what == "compact":
            log.compact(str(directory / "temp"), lambda: list(model.values()))
        else:
            log.close()
            log = IndexLog(str(directory / "log"))
            assert list(log.load().entries.items()) == list(model.items())
    log.close()
    again = IndexLog(str(directory / "log"))
    assert list(again.load().entries.items()) == list(model.items())
    again.close()
