"""A forked child has a copy of its parent's cache, and can use nothing of it: the arena is not mapped there, the threads did not
come along, locks may be held by threads that are gone, and the disk directory is the parent's.

So in the child every lock of a node or session is replaced by one that nobody can take: whatever enters raises `CacheClosed` and
says what to do. Nothing is looked at in the parent; a call there costs what it cost before.
"""

from __future__ import annotations

import os
import weakref
from typing import Final, NoReturn, Protocol

from kvtiers.model.errors import CacheClosed


class ParentsLock:
    """Stands for a lock, or a condition, in a forked child: taking it raises CacheClosed."""

    def __init__(self, owner: int) -> None:
        self._owner = owner

    def __enter__(self) -> NoReturn:
        raise CacheClosed(
            f"this cache belongs to the parent process {self._owner}; open one in the child, with a disk path of its own"
        )

    def __exit__(self, *_: object) -> None:
        """Never called: nobody got in."""

    def notify_all(self) -> None:
        """As of a condition; there is nobody to wake."""

    def wait(self, timeout: float) -> None:
        """As of a condition; nobody got in who could wait."""


class Disownable(Protocol):
    """Something whose locks a forked child must not take."""

    def disown(self, lock: ParentsLock) -> None:
        """In the child, before any other code runs there: put `lock` in the place of every lock. No I/O, nothing that waits."""
        ...


_owned: Final[weakref.WeakSet[Disownable]] = weakref.WeakSet()
_pid = os.getpid()


def left_to_the_parent(thing: Disownable) -> None:
    """Have `disown` called in each child that is forked from now on."""
    _owned.add(thing)


def _in_child() -> None:
    global _pid
    parent, _pid = _pid, os.getpid()
    lock = ParentsLock(parent)
    for thing in list(_owned):
        thing.disown(lock)
    _owned.clear()


os.register_at_fork(after_in_child=_in_child)
