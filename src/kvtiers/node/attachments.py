"""The namespaces that a client is attached to, over all its connections. Pure: what is to be sent is posted by whoever owns it."""

from __future__ import annotations

from collections.abc import Iterator

from kvtiers.model.parts import Parts
from kvtiers.node import protocol as p
from kvtiers.node.handles import Attachment


class Attachments:
    """By namespace, and by the op of those whose answer is still to come."""

    def __init__(self) -> None:
        self._by_namespace: dict[bytes, Attachment] = {}
        self._asked: dict[int, Attachment] = {}

    def __iter__(self) -> Iterator[Attachment]:
        return iter(self._by_namespace.values())

    def find(self, namespace: bytes, parts: Parts, chunk_tokens: int) -> Attachment | None:
        """The one that was declared so; None for a new one, or another shape of a known one."""
        known = self._by_namespace.get(namespace)
        same = known is not None and (known.parts, known.chunk_tokens) == (parts, chunk_tokens)
        return known if same else None

    def add(self, made: Attachment) -> None:
        """A new one, in the place of an older one of its namespace."""
        self._by_namespace[made.namespace] = made

    def ask(self, op: int, space: Attachment) -> p.Attach:
        """What to send for it."""
        self._asked[op] = space
        parts = [(part.group, part.rank, part.nbytes) for part in space.parts]
        return p.Attach(op, space.namespace, parts, space.chunk_tokens, space.itemsize)

    def remove(self, space: Attachment) -> p.Detach | None:
        """It is not wanted any more; what to send, if the service knows it. Idempotent."""
        if self._by_namespace.get(space.namespace) is not space:
            return None
        del self._by_namespace[space.namespace]
        number, space.space = space.space, None
        return None if number is None else p.Detach(number)

    def answered(self, answer: p.Attached) -> p.Detach | None:
        """The service knows it; what to send, if it was detached meanwhile and is not attached anew."""
        space = self._asked.pop(answer.op, None)
        if space is None:
            return None
        if self._by_namespace.get(space.namespace) is space:
            space.space = answer.space
        elif space.namespace not in self._by_namespace:
            return p.Detach(answer.space)
        return None

    def refused(self, op: int, reason: str) -> bool:
        """Whether that was one of these; it says why from now on."""
        space = self._asked.pop(op, None)
        if space is not None:
            space.error = reason
        return space is not None

    def lost(self) -> None:
        """The connection is gone: none is known to any service until it is asked for again."""
        self._asked.clear()
        for space in self:
            space.space = None
