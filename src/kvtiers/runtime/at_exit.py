"""A process that ends without having closed its caches: what only memory holds is still written out.

On the main thread, before the interpreter takes anything down, so that the I/O threads still run. All nodes together get as long
as the most patient of them; a disk that hangs costs that, and then the process ends.
"""

from __future__ import annotations

import atexit
import logging
import time
import weakref
from typing import Final, Protocol

from kvtiers.runtime.plan import NodePlan

_log = logging.getLogger(__name__)


class Closable(Protocol):
    """A node, as far as this page needs it."""

    plan: NodePlan

    @property
    def closed(self) -> bool:
        """Whether a call to `close` has ended."""
        ...

    def close(self, timeout: float | None = None) -> bool:
        """Write out and let go; returns within the time-out. Does nothing in a forked child."""
        ...


_open: Final[weakref.WeakSet[Closable]] = weakref.WeakSet()


def close_at_exit(node: Closable) -> None:
    """Close it when the interpreter ends, if nobody has before."""
    _open.add(node)


def _close_all() -> None:
    left = [node for node in _open if not node.closed]
    deadline = time.monotonic() + max((node.plan.close_timeout_s for node in left), default=0.0)
    for node in left:
        try:
            node.close(min(node.plan.close_timeout_s, max(0.0, deadline - time.monotonic())))
        except Exception:  # noqa: BLE001 - the others are to be closed too
            _log.exception("closing a cache at the end of the process failed")


atexit.register(_close_all)
