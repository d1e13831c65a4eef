"""Damage to a disk directory from outside, for tests of whatever stands on a `DiskStore`; and what `du` says of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kvtiers.model.namespace import FORMAT_VERSION
from kvtiers.model.parts import RecordRef
from kvtiers.records.checksum import checksum
from kvtiers.records.header import HEADER_BYTES, decode_header
from kvtiers.stores.disk.names import parse_record_name, record_name
from kvtiers.testing.sealed_parts import Damage


def du(*paths: Path) -> int:
    """Allocated bytes of everything below the paths, and of themselves, by looking: `du --block-size=1`."""
    seen: dict[tuple[int, int], int] = {}
    for path in paths:
        for name in (path, *path.rglob("*")):
            status = name.lstat()
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def record_files(*paths: Path) -> dict[RecordRef, Path]:
    """Every file with a record's name below the paths; what vanishes meanwhile is left out."""
    found = {}
    for path in paths:
        for folder, _, names in os.walk(path):
            for file in (Path(folder, name) for name in names if name.endswith(".kv")):
                ref = parse_record_name(file.relative_to(path).as_posix())
                if ref is not None:
                    found[ref] = file
    return found


def record_file(path: Path, ref: RecordRef) -> Path:
    """Where the record of `ref` lies below the disk directory `path`."""
    return path / record_name(ref)


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file, in place and on the disk."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
        file.flush()
        os.fsync(file.fileno())


def make_other_version(path: Path) -> None:
    """Turn a record's file into a sound one of the next format version."""
    page = bytearray(path.read_bytes())
    page[8:12] = (FORMAT_VERSION + 1).to_bytes(4, "little")
    page[16:32] = bytes(16)
    page[16:32] = checksum(bytes(page[:HEADER_BYTES]))
    path.write_bytes(page)


def damage_file(path: Path, how: Damage, other: Path | None = None) -> None:
    """Do to a record's file what `how` says. `other`: the file to take for SWAP."""
    header = decode_header(path.read_bytes()[:HEADER_BYTES])
    match how:
        case Damage.FLIP_HEADER:
            flip_bit(path, 40, 3)
        case Damage.FLIP_PAYLOAD:
            flip_bit(path, HEADER_BYTES + header.stored_bytes // 2, 6)
        case Damage.FLIP_PADDING:
            if header.record_bytes == HEADER_BYTES + header.stored_bytes:
                raise ValueError(f"{path} has no padding")
            flip_bit(path, header.record_bytes - 1)
        case Damage.TRUNCATE:
            os.truncate(path, header.record_bytes // 2)
        case Damage.EMPTY:
            os.truncate(path, 0)
        case Damage.REMOVE:
            path.unlink()
        case Damage.SWAP:
            if other is None:
                raise ValueError("SWAP needs another record's file")
            shutil.copyfile(other, path)
