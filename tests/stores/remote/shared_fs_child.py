"""Writes and removes a few records of a shared directory at random until it is ended: `shared_fs_child.py PATH SEED`.

Run by test_shared_fs.py. Two of these and a reader are three hosts that know nothing of each other.
"""

from __future__ import annotations

import random
import sys

from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.shared_fs import SharedFsSettings, shared_fs_store
from kvtiers.testing.sealed_parts import make_part

NUMBERS = 6
VERSIONS = 3
NBYTES = 60_000


def main() -> None:
    path, seed = sys.argv[1:]
    rng = random.Random(int(seed))
    store = shared_fs_store(SharedFsSettings(path), codec_for("none" if int(seed) % 2 else "zstd"))
    store.open()
    parts = {
        (number, version): make_part(number, NBYTES, version=version)
        for number in range(NUMBERS)
        for version in range(VERSIONS)
    }
    print("ready", flush=True)
    while True:
        part = parts[rng.randrange(NUMBERS), rng.randrange(VERSIONS)]
        if rng.random() < 0.5:
            store.write(part)
        else:
            store.delete(part.ref)


if __name__ == "__main__":
    main()
