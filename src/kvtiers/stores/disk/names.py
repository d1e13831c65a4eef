"""Names: where a record lies below a disk directory, and which directory it goes to. Pure functions.

    <path>/lock                                           held while a process owns the directory
    <path>/index-v1.log                                   the hint from which the next run starts fast
    <path>/tmp/<pid>-<n>.tmp                              records on their way; rubbish once their process is dead
    <path>/<namespace hex>/<hh>/<hh>/<key hex>.<part>.kv  records; hh are the first two bytes of the key

Everything else is someone else's: counted, never touched.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Final

from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import RecordRef

LOCK_NAME: Final = "lock"
LOG_NAME: Final = "index-v1.log"
TEMP_DIRECTORY: Final = "tmp"

_RECORD: Final = re.compile(
    r"([0-9a-f]{64})/([0-9a-f]{2})/([0-9a-f]{2})/(\2\3[0-9a-f]{60})\.(0|[1-9][0-9]{0,4})\.kv"
)
_RECORD_DIRECTORY: Final = re.compile(r"[0-9a-f]{64}(/[0-9a-f]{2}){0,2}")
_TEMP: Final = re.compile(rf"{TEMP_DIRECTORY}/[0-9]+-[0-9]+\.tmp")
_MAX_PART: Final = 65_535


def record_name(ref: RecordRef) -> str:
    """Path of a record below its disk directory."""
    key = ref.key.hex()
    return f"{ref.namespace.hex()}/{key[:2]}/{key[2:4]}/{key}.{ref.part}.kv"


def parse_record_name(name: str) -> RecordRef | None:
    """The inverse of `record_name`; None for any other name."""
    match = _RECORD.fullmatch(name)
    if match is None or int(match[5]) > _MAX_PART:
        return None
    return RecordRef(bytes.fromhex(match[1]), ChunkKey(bytes.fromhex(match[4])), int(match[5]))


def is_record_directory(name: str) -> bool:
    """Whether a directory of this name is one that records are put into."""
    return _RECORD_DIRECTORY.fullmatch(name) is not None


def temp_name(pid: int, number: int) -> str:
    """Path of a record that is being written."""
    return f"{TEMP_DIRECTORY}/{pid}-{number}.tmp"


def is_temp_name(name: str) -> bool:
    """Whether a file of this name is a record that some process was writing."""
    return _TEMP.fullmatch(name) is not None


def by_preference(paths: Sequence[str], key: ChunkKey) -> list[int]:
    """Indices of `paths`, the one a new chunk should go to first.

    Rendezvous hashing (Thaler and Ravishankar, 1998): independent of the order of the paths, and one path more or less moves
    only its own share of the keys. All parts of a chunk go to one path: a lost disk costs whole chunks, not half of all.
    """
    if len(paths) == 1:
        return [0]
    return sorted(range(len(paths)), key=lambda i: _weight(paths[i], key), reverse=True)


def _weight(path: str, key: ChunkKey) -> bytes:
    return hashlib.blake2b(
        key, key=hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=16).digest()
    ).digest()
