"""Clients that a forked child has inherited: connection and mapping are its parent's, so there each lets go of them at once."""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol


class Disowning(Protocol):
    """What is its process' alone."""

    def disown(self) -> None:
        """In a forked child: give up what the parent uses, without a word to anybody."""


_living: Final[weakref.WeakSet[Disowning]] = weakref.WeakSet()


def disown_in_children(client: Disowning) -> None:
    """From now on, as long as it lives."""
    _living.add(client)


def _disown_all() -> None:
    for client in list(_living):
        client.disown()


os.register_at_fork(after_in_child=_disown_all)
