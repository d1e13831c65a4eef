"""The engine's side: posts requests, takes what answers have come, and never waits for the service.

    client = NodeClient(path)
    space = client.attach(namespace, parts, chunk_tokens=256, itemsize=2)
    load = client.stage(space, keys, deadline=time.monotonic() + 2)
    ...                      # at each engine step:
    client.step()            # sends what was posted as one frame, takes what has arrived
    if load.done: ...        # copy client.view(load.arena, offset, nbytes), then client.release(load)

- `step` makes a few system calls that don't block. All other calls only post, and return at once.
- Every load and store gets its answer: from the service, or, if that is silent past the deadline, full or gone, as a miss or a
  refusal from here. Whoever was given slots gives them back: `release`, `commit` or `abort`.
- A lost service is logged once and connected to again with growing pauses; namespaces are attached again then. What was asked on an
  old connection is never answered by a new one, and slots of an old arena are never handed out again.
- No threads. One thread calls; only `view` may be called by any.
"""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Parts
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.node import protocol as p
from kvtiers.node.answers import fill_load, fill_store
from kvtiers.node.attachments import Attachments
from kvtiers.node.backoff import Backoff
from kvtiers.node.forked_clients import disown_in_children
from kvtiers.node.framing import ProtocolError
from kvtiers.node.handles import Answer, Attachment, Load, Store
from kvtiers.node.mapped_arena import Bytes, MappedArena
from kvtiers.node.outstanding import Outstanding
from kvtiers.node.tenures import Tenures
from kvtiers.node.wire import LinkLost, ServiceLink

_log = logging.getLogger(__name__)

MAX_OUTSTANDING: Final = 1024
"""Requests that may be unanswered; one more is a miss or a refusal at once."""
MAX_POSTED_BYTES: Final = 4 << 20
"""Bytes that may wait to be sent; the same beyond."""
STORE_ANSWER_S: Final = 5.0
GRACE_S: Final = 0.25
"""How long past its deadline the answer to a load may come: it is on its way then."""
_ALIVE_TIMES: Final = 4
"""How often in a lease's time a client that has nothing else to say says that it is alive."""
_WELCOME_WITHIN_S: Final = 10.0


class NodeClient:
    """One process' connection to the cache of its node."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str = "",
        engine: bytes = b"",
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """Connects at the first `step`. `engine`: a token that all processes of one engine share, if slots one of them was given are
        written or read by the others; empty: this process is all of it. `name` is for the service's log.
        """
        self._path = Path(path)
        self._hello = p.Hello(p.PROTOCOL_VERSION, name[:1000], engine)
        self._clock = clock
        self._link: ServiceLink | None = None
        self._connected = False
        self._arena: MappedArena | None = None
        self._arena_id = b""
        self._attachments = Attachments()
        self._waiting = Outstanding()
        self._answers: dict[int, Answer] = {}
        self._commits: dict[int, tuple[Store, int]] = {}
        self._posted: list[p.Request] = []
        self._posted_bytes = 0
        self._tenures = Tenures()
        self._last_op = 0
        self._backoff = Backoff(rng or random.Random())
        self._retry_at = float("-inf")
        self._connecting_since = 0.0
        self._sent_at = 0.0
        self._alive_every = float("inf")
        self._told_down = False
        self._closed = False
        self.on_connected: Callable[[int, MappedArena], None] | None = None
        """Called in `step` with the socket's descriptor and the arena of each new connection."""
        self.counters = dict.fromkeys(
            ("connects", "losses", "sent", "answers", "late", "overflows", "unreachable"), 0
        )
        """Connections made and lost, messages sent, answers taken, requests given up at their deadline, refused here because too
        much was outstanding, refused here because there was no service."""
        disown_in_children(self)

    # --- asking: posts only ----------------------------------------------------------------------------------------------

    def attach(self, namespace: bytes, parts: Parts, *, chunk_tokens: int, itemsize: int) -> Attachment:
        """Declare a namespace (32 bytes) and the parts of its chunks. Holds across reconnects; the same one twice is one."""
        known = self._attachments.find(namespace, parts, chunk_tokens)
        if known is not None:
            return known
        made = Attachment(namespace, parts, chunk_tokens, itemsize)
        self._attachments.add(made)
        if self._connected:
            self._post(self._attachments.ask(self._next_op(), made))
        return made

    def detach(self, space: Attachment) -> None:
        """Nothing more is asked of that namespace: loads and stores of it are misses and refusals from now on. Idempotent.

        What is open of it goes on. What the tiers hold of it stays, for whoever attaches it again.
        """
        detach = self._attachments.remove(space)
        if detach is not None:
            self._post(detach)

    def stage(self, space: Attachment, keys: Sequence[ChunkKey], *, deadline: float) -> Load:
        """Bring the longest prefix of `keys` to the arena and lease it; answered by `deadline` (of the client's clock)."""
        load = Load(self._next_op(), space, self._tenures.epoch)
        refusal = self._cannot_ask(space, keys)
        if refusal is not None:
            load.done, load.closed = True, True
            load.stopped_by = refusal
            return load
        timeout_ms = min(max(0, int((deadline - self._clock()) * 1000)), p.MAX_TIMEOUT_MS)
        self._post(p.Stage(load.op, space.space or 0, b"".join(keys), timeout_ms), 32 * len(keys))
        self._waiting.add(load, deadline + GRACE_S)
        return load

    def open_store(
        self, space: Attachment, root: ChunkKey, keys: Sequence[ChunkKey], *, first: int = 0
    ) -> Store:
        """Ask for slots for the chunks `keys[first:]` that no tier has. `keys` is the whole chain, `root` the first one's parent."""
        store = Store(self._next_op(), space, self._tenures.epoch)
        refusal = self._cannot_ask(space, keys)
        if refusal is not None or first >= len(keys):
            self._refuse(store, first, len(keys))
            return store
        store.refused = [(first, len(keys) - first, Refusal.TIER_OPEN)]  # unless the answer says otherwise
        self._post(p.OpenStore(store.op, space.space or 0, root, b"".join(keys), first), 32 * len(keys))
        self._waiting.add(store, self._clock() + STORE_ANSWER_S)
        return store

    def commit(self, store: Store, indices: Iterable[int] | None = None) -> bool:
        """All parts of these chunks (None: all open ones) lie in their slots. `store.committed` counts them when the service has said so,
        `store.lost` when it can't be expected to any more.

        False if nothing was posted: none of them is open, or the connection they were given on is lost.
        """
        chosen = store.open if indices is None else store.open.intersection(indices)
        if not chosen:
            return False
        current = self._is_current(store)
        if current:
            op = self._next_op()
            everything = len(chosen) == len(store.open)
            self._post(p.Commit(op, store.op, None if everything else sorted(chosen)))
            self._commits[op] = (store, len(chosen))
        store.open = store.open - chosen
        if not store.open:
            self._give_back(store)
        return current

    def abort(self, store: Store) -> None:
        """Nobody writes any more to what is still open of it; also if it has not been answered yet. Idempotent."""
        store.open = set()
        self._close_handle(store, p.Abort(store.op))

    def release(self, load: Load, used: range | None = None) -> None:
        """Nobody reads its slots any more; also if it has not been answered yet. Idempotent.

        `used`: those of its chunks that were copied out, which count as hits; None: all.
        """
        message = p.Release(load.op) if used is None else p.Release(load.op, used.start, used.stop)
        self._close_handle(load, message)

    def report(
        self,
        *,
        gpu_usage: float,
        prefill_tokens_per_s: float,
        local_lookups: int = 0,
        local_hits: int = 0,
        local_hit_tokens: int = 0,
    ) -> bool:
        """Tell the service how the engine is doing, for its operator; hits of its own prefix cache in chunks, since the last report.

        False if it was not posted: there is no connection, or one of the rates is no finite number.
        """
        known = math.isfinite(gpu_usage) and math.isfinite(prefill_tokens_per_s)
        if not known or not self._connected or self._posted_bytes >= MAX_POSTED_BYTES:
            return False
        usage, rate = min(max(gpu_usage, 0.0), 1.0), max(prefill_tokens_per_s, 0.0)
        self._post(p.Report(usage, rate, local_lookups, local_hits, local_hit_tokens))
        return True

    def stats(self) -> Answer:
        """Ask for the service's statistics: JSON as bytes, or None if they did not come."""
        answer = Answer()
        if not self._connected or len(self._answers) >= MAX_OUTSTANDING:
            answer.done = True
            return answer
        op = self._next_op()
        self._answers[op] = answer
        self._post(p.GetStats(op))
        return answer

    # --- reading and writing ---------------------------------------------------------------------------------------------

    def view(self, arena: bytes, offset: int, nbytes: int) -> Bytes | None:
        """A slot's bytes, to copy from or into; from any thread. None if that arena is not mapped here (any more): a miss.

        `arena` and `offset` are those of a load or store, of this process or of another one of the same engine.
        """
        mapped = self._arena
        if mapped is None or mapped.id != arena:
            return None
        return mapped.view(offset, nbytes)

    @property
    def connected(self) -> bool:
        """Whether the service has welcomed this client, as far as is known."""
        return self._connected

    @property
    def outstanding(self) -> int:
        """Loads and stores not answered yet."""
        return len(self._waiting)

    # --- the engine's step -----------------------------------------------------------------------------------------------

    def step(self) -> int:
        """Send what was posted, take what has arrived; returns the number of answers. Connects if there is no connection.

        Never waits and never raises: a service that is gone or talks nonsense is a lost connection.
        """
        if self._closed:
            return 0
        answers = 0
        try:
            if self._link is None:
                self._connect()
            if self._link is not None:
                self._send()
                for batch in self._link.receive():
                    for answer in batch:
                        self._take(answer)
                        answers += 1
                self._send()
                if not self._connected and self._clock() - self._connecting_since > _WELCOME_WITHIN_S:
                    raise LinkLost("it does not answer")
        except (LinkLost, ProtocolError) as error:
            self._lose(str(error))
        self._give_up_late()
        self.counters["answers"] += answers
        return answers

    def close(self) -> None:
        """Say goodbye. Nobody may use a slot any more that this client was given. Idempotent; never waits."""
        if self._closed:
            return
        if self._link is not None:
            try:
                self._post(p.Goodbye())
                self._send()
            except (LinkLost, ProtocolError):
                pass
        self._closed = True
        self._drop_link()
        self._tenures.forget()

    def disown(self) -> None:
        """In a forked child: the connection and the mapping are the parent's; everything is a miss here."""
        self._closed = True
        if self._link is not None:
            self._link.leave_open()
        self._drop_link()

    # --- inside: asking ---------------------------------------------------------------------------------------------------

    def _cannot_ask(self, space: Attachment, keys: Sequence[ChunkKey]) -> MissReason | None:
        if not self._connected or space.space is None:
            self.counters["unreachable"] += 1
            return MissReason.TIER_OPEN
        full = len(self._waiting) >= MAX_OUTSTANDING or self._posted_bytes >= MAX_POSTED_BYTES
        if full or len(keys) > p.MAX_KEYS or len(keys) * len(space.parts) > p.MAX_SLOTS:
            self.counters["overflows"] += 1
            return MissReason.TIER_OPEN
        return None

    def _next_op(self) -> int:
        self._last_op += 1
        return self._last_op

    def _post(self, message: p.Request, nbytes: int = 0) -> None:
        self._posted.append(message)
        self._posted_bytes += nbytes + 64

    def _is_current(self, handle: Load | Store) -> bool:
        return handle.epoch == self._tenures.epoch and self._connected

    def _close_handle(self, handle: Load | Store, message: p.Request) -> None:
        if handle.closed:
            return
        if self._waiting.pop(handle.op) is not None:
            self._end_unanswered(handle)
        if self._is_current(handle):
            self._post(message)
        self._give_back(handle)

    def _give_back(self, handle: Load | Store) -> None:
        """Its user is done with its slots. The service is told when that is true of all slots of a lost connection."""
        if handle.closed:
            return
        handle.closed = True
        if len(handle.offsets):
            self._tenures.given_back(handle.epoch)
            self._settle_old()

    def _settle_old(self) -> None:
        if self._connected:  # else the next welcome comes to it
            for connection in self._tenures.take_settled():
                self._post(p.Settled(connection))

    @staticmethod
    def _refuse(store: Store, first: int, end: int) -> None:
        store.done, store.closed = True, True
        if end > first:
            store.refused = [(first, end - first, Refusal.TIER_OPEN)]

    @staticmethod
    def _end_unanswered(handle: Load | Store, reason: MissReason = MissReason.TIER_OPEN) -> None:
        handle.done = True
        if isinstance(handle, Load):
            handle.stopped_by = reason

    # --- inside: answers --------------------------------------------------------------------------------------------------

    def _take(self, answer: p.Answer) -> None:
        if isinstance(answer, p.Staged | p.Opened):
            self._granted(answer)
        elif isinstance(answer, p.Committed):
            store, count = self._commits.pop(answer.op, (None, 0))
            if store is not None:
                store.committed += count
        elif isinstance(answer, p.Stats):
            self._resolve(answer.op, answer.json)
        elif isinstance(answer, p.Attached):
            detach = self._attachments.answered(answer)
            if detach is not None:
                self._post(detach)
        elif isinstance(answer, p.Failed):
            self._failed(answer)
        elif isinstance(answer, p.Farewell):
            if not answer.again:
                self._backoff.hopeless()
            raise LinkLost(answer.reason)
        else:
            self._welcomed(answer)

    def _granted(self, answer: p.Staged | p.Opened) -> None:
        handle, arena = self._waiting.get(answer.op), self._arena
        if handle is None:
            return  # given up meanwhile, and the service was told
        if arena is None:
            raise ProtocolError("an answer before the arena")
        if isinstance(answer, p.Staged):
            fill_load(handle, answer, arena)
        else:
            fill_store(handle, answer, arena)
        self._waiting.pop(answer.op)
        if not handle.closed:
            self._tenures.given()

    def _failed(self, answer: p.Failed) -> None:
        if self._attachments.refused(answer.op, answer.reason):
            _log.error("the cache does not take this model's KV, everything is a miss: %s", answer.reason)
            return
        handle = self._waiting.pop(answer.op)
        if handle is not None:
            self._end_unanswered(handle)
            handle.closed = True
        store, count = self._commits.pop(answer.op, (None, 0))
        if store is not None:
            store.lost += count
        self._resolve(answer.op, None)
        _log.warning("the cache refused a request: %s", answer.reason)

    def _resolve(self, op: int, value: Any) -> None:
        answer = self._answers.pop(op, None)
        if answer is not None:
            answer.done, answer.value = True, value

    def _give_up_late(self) -> None:
        """Requests past their deadline: answered here, and the service is told not to."""
        for handle in self._waiting.overdue(self._clock()):
            self.counters["late"] += 1
            self._end_unanswered(handle, MissReason.STAGING_TIMEOUT)
            handle.closed = True
            if self._is_current(handle):
                self._post(p.Release(handle.op) if isinstance(handle, Load) else p.Abort(handle.op))

    # --- inside: the connection ---------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        now = self._clock()
        if now < self._retry_at:
            return
        self._connecting_since = now
        link = ServiceLink.open(self._path)
        if isinstance(link, str):
            self._retry_at = self._clock() + self._backoff.pause()
            if not self._told_down:
                self._told_down = True
                _log.warning(
                    "no cache at %s (%s): every lookup is a miss until there is one", self._path, link
                )
            return
        self._link = link
        self._posted = [self._hello]
        self._posted_bytes = 0

    def _welcomed(self, answer: p.Welcome) -> None:
        link = self._link
        if link is None or self._connected or answer.version != p.PROTOCOL_VERSION:
            raise ProtocolError("a second welcome, or one of another version")
        fd = link.take_descriptor()
        if fd < 0:
            raise ProtocolError("a welcome without the arena")
        try:
            self._arena = MappedArena(fd, answer.arena_bytes, answer.arena)
        except OSError as error:
            raise ProtocolError(f"the arena can't be mapped: {error}") from None
        if answer.arena != self._arena_id:  # another service knows nothing of the old one's connections
            self._tenures.forget()
        self._arena_id = answer.arena
        self._tenures.begin(answer.connection)
        self._connected = True
        self._alive_every = answer.lease_timeout_ms / 1000 / _ALIVE_TIMES
        if self.on_connected is not None:
            self.on_connected(link.fileno(), self._arena)
        self._backoff.succeeded()
        self.counters["connects"] += 1
        (_log.warning if self._told_down else _log.info)("connected to the cache at %s", self._path)
        self._told_down = False
        self._settle_old()
        for space in self._attachments:
            self._post(self._attachments.ask(self._next_op(), space))

    def _send(self) -> None:
        link = self._link
        if link is None:
            return
        now = self._clock()
        if not self._posted and now - self._sent_at > self._alive_every and self._tenures.holding:
            self._posted.append(p.Alive())
        if self._posted and not link.congested:
            self.counters["sent"] += len(self._posted)
            posted, self._posted, self._posted_bytes = self._posted, [], 0
            self._sent_at = now
            link.post(posted)
        link.flush()

    def _lose(self, reason: str) -> None:
        """Everything unanswered is a miss; slots that were given stay readable until their user gives them back."""
        self.counters["losses"] += self._connected
        if not self._told_down:
            self._told_down = True
            _log.warning(
                "the cache at %s is lost (%s): every lookup is a miss until it is back", self._path, reason
            )
        self._drop_link()
        self._retry_at = self._clock() + self._backoff.pause()

    def _drop_link(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = None
        self._connected = False
        self._arena = None  # unmapped now, or with the last view
        self._posted, self._posted_bytes = [], 0
        for handle in self._waiting.take_all():
            self._end_unanswered(handle)
            handle.closed = True
        for answer in self._answers.values():
            answer.done = True
        self._attachments.lost()
        self._answers.clear()
        for store, count in self._commits.values():
            store.lost += count
        self._commits.clear()
