"""A node that lends memory to a Mooncake Store and does nothing else, as a process: `python -m … MASTER MIB [SSD_DIRECTORY]`."""

from __future__ import annotations

import sys
import time

from kvtiers.model.errors import StoreUnavailable
from kvtiers.stores.mooncake.session import Session
from kvtiers.stores.mooncake.settings import MooncakeSettings

READY = "lends"


def main(master: str, mib: str, ssd: str = "") -> None:
    """Until it is killed."""
    session = Session(
        MooncakeSettings(
            master, segment_bytes=int(mib) << 20, enable_ssd_offload=bool(ssd), ssd_offload_path=ssd
        )
    )
    session.open()
    while True:
        try:
            with session.client():
                break
        except StoreUnavailable as error:
            print(error, flush=True)  # noqa: T201 - its log
            time.sleep(0.1)
    print(READY, flush=True)  # noqa: T201 - its starter waits for it
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main(*sys.argv[1:])
