"""Errors that only this interface has; each is a class of the tree in `kvtiers.model.errors`."""

from __future__ import annotations

from kvtiers.model.errors import KvtiersError, StoreTransient


class NoBackend(KvtiersError):
    """The tier exists, but nothing was given that stores for it."""


class UnknownTask(KvtiersError):
    """No offload task of this id is remembered."""


class InvalidPointer(KvtiersError):
    """A pointer that was freed, or that this allocator never gave out."""


class OffloadQueueFull(StoreTransient):
    """As many offloads are under way as may be. The chunk stays where it was; try again at its next touch or eviction."""


class OffloadRetryableError(StoreTransient):
    """An offload failed. The chunk stays where it was; try again at its next touch or eviction.

    `__cause__` is what went wrong.
    """

    def __init__(self, task_id: str, key: str, target: str) -> None:
        super().__init__(task_id, key, target)  # so that it can be pickled
        self.task_id = task_id
        self.key = key
        self.target = target

    def __str__(self) -> str:
        why = f": {self.__cause__}" if self.__cause__ is not None else ""
        return (
            f"{self.task_id}: {self.key!r} did not reach the {self.target} tier{why}; it stays where it was, "
            "submit it again at its next touch or eviction"
        )
