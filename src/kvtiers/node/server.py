"""The control thread: one epoll over the listening socket, every client's socket and every client's pidfd.

It decodes what arrived, calls the node, and answers each batch in one frame. It never waits for anything but the next event:
loads that need a disk are answered when another thread says so (a queue and an eventfd), a client that does not read is closed,
and whatever one client sends can end that client's connection only.

A client ends in one of four ways: it says goodbye; its socket ends; its process ends, though a forked child may still hold the
socket; or it holds leases and is not heard of for too long (stopped). `departures` says when its slots may be used again.
"""

from __future__ import annotations

import logging
import math
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Final

from kvtiers.model.errors import KvtiersError
from kvtiers.model.tiers import Tier
from kvtiers.node import protocol as p
from kvtiers.node.claims import Claims
from kvtiers.node.connection import Connection, ConnectionEnded, NotReading
from kvtiers.node.departures import Departures
from kvtiers.node.framing import ProtocolError
from kvtiers.node.peers import Peer, Process, peer_of
from kvtiers.node.reports import Books, LocalHits, Savings, gpu_tier
from kvtiers.node.session import EngineSession
from kvtiers.node.wake import Wake
from kvtiers.runtime.memory_map import memory_map
from kvtiers.runtime.node import CacheNode

_log = logging.getLogger(__name__)

_TICK_S: Final = 0.5
_HELLO_WITHIN_S: Final = 10.0
_ACCEPTS_AT_ONCE: Final = 16
_LAST_READS: Final = 16
STOP_WITHIN_S: Final = 5.0
_MOST_LOST: Final = 256
"""Lost connections of one process that it has not settled. Each holds a session; their process' end lets go of all at once."""
_BREATH_S: Final = 0.05
"""After what would else be tried again at once, for ever."""


class NodeServer:
    """Serves one node on one listening socket. `start`, then `stop`."""

    def __init__(
        self,
        node: CacheNode,
        listener: socket.socket,
        *,
        lease_timeout_s: float = 60.0,
        max_clients: int = 256,
        max_outbox_bytes: int = 16 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`lease_timeout_s`: a client that holds slots and is silent for so long is taken for stopped."""
        self._node = node
        self._listener = listener
        self._lease_timeout = lease_timeout_s
        self._max_clients = max_clients
        self._max_outbox = max_outbox_bytes
        self._clock = clock
        self._arena_id = os.urandom(32)
        self._selector = selectors.EpollSelector()
        self._wake = Wake()
        self._late: deque[tuple[EngineSession, int]] = deque()
        self._clients: dict[int, Connection] = {}
        """Open connections, by number."""
        self._unheard: dict[Connection, None] = {}
        """Those with more to say than one turn is long."""
        self._held: dict[int, Connection] = {}
        """Those and the closed ones whose slots may still be in use."""
        self._processes: dict[int, Process] = {}
        self._departures: Departures[int, Process] = Departures()
        self._books = Books(Savings(), LocalHits())
        self._last_number = 0
        self._ticked_at = clock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtiers-control", daemon=True)
        self.counters = dict.fromkeys(("accepted", "refused", "garbage", "expired", "unread", "lost"), 0)
        """Connections taken and refused; connections closed for what they sent, for silence, for not reading; clients lost."""

    def start(self) -> None:
        """Begin to serve."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake, selectors.EVENT_READ, self._answer_late)
        self._thread.start()

    def stop(self, timeout: float = STOP_WITHIN_S) -> bool:
        """Accept nobody any more, take what has arrived, tell the clients and close. False if that did not end in time."""
        self._stopping.set()
        self._wake.signal()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def clients(self) -> list[dict[str, Any]]:
        """Every open connection: number, pid, name, loads and stores held, for how long the oldest of them, bytes that its process
        has open to write to, and what it reported last. For any thread.
        """
        found = []
        for connection in list(self._clients.values()):
            session = connection.session
            report = session.report if session is not None else None
            rate = report.prefill_tokens_per_s if report is not None else math.nan
            found.append(
                {
                    "connection": connection.number,
                    "pid": connection.process.pid,
                    "name": connection.name,
                    "sessions": list(session.core_sessions) if session is not None else [],
                    "holding": session.holding if session is not None else 0,
                    "oldest_s": round(session.oldest_s, 3) if session is not None else 0.0,
                    "process_storing_bytes": connection.process.claims.nbytes,
                    "gpu_usage": report.gpu_usage if report else None,
                    "prefill_tokens_per_s": rate if math.isfinite(rate) else None,
                }
            )
        return found

    def memory(self) -> dict[str, Any]:
        """Every slot in use and whose it is (`memory_map`); `clients` tells whose sessions those are. For any thread."""
        return {**memory_map(self._node), "clients": self.clients}

    def stats(self) -> dict[str, Any]:
        """The node's, the GPU tier as the engines report it, and under `service` what is connected. For any thread."""
        stats, clients = self._node.stats(), self.clients
        usages = (one["gpu_usage"] for one in clients if one["gpu_usage"] is not None)
        gpu = gpu_tier(usages, self._books.local_hits)
        if gpu:
            stats["tiers"][Tier.GPU] = {**stats["tiers"].get(Tier.GPU, {}), **gpu}
        stats["service"] = {
            "clients": clients,
            "departing": len(self._held)
            - sum(one.session is not None for one in list(self._clients.values())),
            "connections": dict(self.counters),
            "prefill_s_saved": self._books.savings.seconds,
        }
        return stats

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                for key, events in self._selector.select(0 if self._unheard else _TICK_S):
                    self._dispatch(key.data, events)
                for connection in list(self._unheard):
                    self._serve(connection, selectors.EVENT_READ)
                self._tick()
            except Exception:  # noqa: BLE001 - the others are still to be served
                _log.exception("the control thread stumbled; this is a bug in kvtiers")
                self._stopping.wait(_BREATH_S)
        try:
            self._wind_up()
        except Exception:  # noqa: BLE001 - the service ends all the same
            _log.exception("the control thread could not end in order; this is a bug in kvtiers")

    def _dispatch(self, target: Any, events: int) -> None:
        if isinstance(target, Connection):
            # one that has not been heard out has its turn after all others
            self._serve(target, events & ~selectors.EVENT_READ if target in self._unheard else events)
        elif isinstance(target, Process):
            self._process_gone(target)
        else:
            target()

    def _tick(self) -> None:
        now = self._clock()
        if now - self._ticked_at < _TICK_S:
            return
        self._ticked_at = now
        for connection in list(self._clients.values()):
            silent = now - connection.heard_at
            if connection.session is None:
                if silent > _HELLO_WITHIN_S:
                    self._end(connection, f"it has not said hello for {silent:.0f} s")
            elif connection.session.holding and silent > self._lease_timeout:
                self.counters["expired"] += 1
                self._say_farewell(connection, "expired: attach again", again=True)
                self._end(
                    connection, f"it holds slots and was silent for {silent:.0f} s: they are quarantined"
                )

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:  # out of descriptors, most likely
                _log.warning("a connection could not be accepted: %s", error)
                self._stopping.wait(_BREATH_S)
                return
            try:
                self._admit(sock)
            except OSError as error:
                _log.info("a client was gone before it was served: %s", error)
                sock.close()

    def _admit(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        peer = peer_of(sock)
        refusal = self._refusal(peer)
        if refusal is not None:
            _log.warning("process %d is not served: %s", peer.pid, refusal)
            self.counters["refused"] += 1
            sock.close()
            return
        self._last_number += 1
        connection = Connection(
            self._last_number, sock, self._process(sock), max_outbox_bytes=self._max_outbox
        )
        connection.heard_at = self._clock()
        self.counters["accepted"] += 1
        self._clients[connection.number] = connection
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _refusal(self, peer: Peer) -> str | None:
        if peer.uid != os.getuid():
            return f"it is of user {peer.uid}"
        if not peer.pid:
            return (
                "it lives in a PID namespace that can't be seen from here, so its end could not be; "
                "run the service with hostPID, or in one pod with shareProcessNamespace"
            )
        if len(self._clients) >= self._max_clients:
            return "there are too many clients"
        if len(self._held) - len(self._clients) >= _MOST_LOST and self._lost_of(peer.pid) >= _MOST_LOST:
            return f"it has lost {_MOST_LOST} connections without a goodbye, and not said that it uses none of their slots"
        return None

    def _lost_of(self, pid: int) -> int:
        return sum(one.closed and one.process.pid == pid for one in self._held.values())

    def _process(self, sock: socket.socket) -> Process:
        """One for all connections of a process. A pid that is in use again is another process."""
        known = self._processes.get(peer_of(sock).pid)
        if known is not None:
            if not known.gone:
                return known
            self._process_gone(known)  # its end was not looked at yet
        process = Process(sock, Claims(self._node.plan.core.cpu.capacity))
        self._processes[process.pid] = process
        self._selector.register(process, selectors.EVENT_READ, process)
        return process

    # --- one client ---------------------------------------------------------------------------------------------------

    def _serve(self, connection: Connection, events: int) -> bool:
        """One turn of one client; False if there was nothing to hear."""
        heard = False
        if connection.closed:  # by an earlier event of the same round
            return heard
        with self._blaming(connection):
            if events & selectors.EVENT_READ:
                heard = bool(connection.inbox) or connection.receive()
                self._hear(connection)
            if events & selectors.EVENT_WRITE:
                connection.flush()
        self._watch(connection)
        return heard

    @contextmanager
    def _blaming(self, connection: Connection) -> Iterator[None]:
        """Whatever goes wrong with one client ends that client's connection, and nothing else."""
        try:
            yield
        except ProtocolError as error:
            self.counters["garbage"] += 1
            self._end(connection, f"it sent what makes no sense: {error}")
        except ConnectionEnded as error:
            self.counters["unread"] += isinstance(error, NotReading)
            self._end(connection, str(error))
        except KvtiersError as error:  # the node is closing
            self._end(connection, str(error))
        except Exception:  # noqa: BLE001 - one client's trouble is not another's
            _log.exception("%s could not be served; this is a bug in kvtiers", connection.name)
            self._end(connection, "of a bug in kvtiers")

    def _hear(self, connection: Connection) -> None:
        """Handle what it has said, as far as its turn goes."""
        connection.heard_at = self._clock()
        if connection.session is not None:
            connection.session.begin_turn()
        answers = list(self._answers(connection))
        connection.send(answers)
        if connection.session is not None:
            connection.session.end_turn()
        if answers:
            self._node.go_on()  # with what need not be done before the answers
        if connection.inbox and not connection.closed:
            self._unheard[connection] = None
        else:
            self._unheard.pop(connection, None)

    def _answers(self, connection: Connection) -> Iterator[p.Answer]:
        """To be sent when the turn's messages were heard: a goodbye counts also if its client reads no answers any more."""
        for message in connection.next_turn():
            session = connection.session
            if session is None or isinstance(message, p.Hello):
                self._greet(connection, message)
            elif isinstance(message, p.Goodbye):
                self._depart(connection)
            elif isinstance(message, p.Settled):
                self._settle(connection, message.connection)
            elif not isinstance(message, p.Alive):
                answer = session.handle(message)
                if answer is not None:
                    yield answer

    def _greet(self, connection: Connection, message: p.Request) -> None:
        if not isinstance(message, p.Hello) or connection.session is not None:
            raise ProtocolError(f"{type(message).__name__} where hello was expected, or a second hello")
        if message.version != p.PROTOCOL_VERSION:
            reason = f"it speaks version {message.version} of the protocol, this service {p.PROTOCOL_VERSION}"
            self._say_farewell(connection, reason, again=False)
            self._end(connection, reason)
            return
        connection.name = f"{message.name or 'engine'} (process {connection.process.pid})"
        connection.session = EngineSession(
            self._node,
            connection.process.pid,
            connection.process.claims,
            self._announce,
            self.stats,
            self._books,
        )
        self._held[connection.number] = connection
        self._departures.joined(connection.number, connection.process, message.engine)
        arena = self._node.arena
        lease_ms = min(max(1, int(self._lease_timeout * 1000)), p.MAX_TIMEOUT_MS)
        welcome = p.Welcome(p.PROTOCOL_VERSION, connection.number, self._arena_id, arena.nbytes, lease_ms)
        connection.send([welcome], arena.fileno())
        _log.info("%s is connected", connection.name)

    def _settle(self, connection: Connection, number: int) -> None:
        """It speaks for earlier connections of its own process only."""
        earlier = self._held.get(number)
        if earlier is not None and earlier.closed and earlier.process is connection.process:
            self._let_go(self._departures.settled(number))

    def _depart(self, connection: Connection) -> None:
        _log.info("%s says goodbye", connection.name)
        self._close(connection)
        self._let_go(self._departures.goodbye(connection.number))

    def _end(self, connection: Connection, reason: str) -> None:
        """The connection is over; its process may still use the slots it was given."""
        if connection.closed:
            return
        level = logging.WARNING if reason else logging.INFO
        _log.log(level, "%s: connection closed: %s", connection.name, reason or "the client closed it")
        self._close(connection)
        if connection.session is not None:
            self.counters["lost"] += 1
            connection.session.lose()
            self._departures.lost(connection.number)

    def _close(self, connection: Connection) -> None:
        self._clients.pop(connection.number, None)
        self._unheard.pop(connection, None)
        self._selector.unregister(connection.sock)
        connection.close()
        self._forget(connection.process)

    def _process_gone(self, process: Process) -> None:
        """The pidfd goes at once, as it stays readable; what waits for others of its engine does so by the books."""
        if not self._unwatch(process):
            return
        for connection in [one for one in self._clients.values() if one.process is process]:
            self._take_what_arrived(connection)
            self._end(connection, "its process has ended")
        self._let_go(self._departures.gone(process))

    def _take_what_arrived(self, connection: Connection) -> None:
        """What it sent before it ended counts."""
        reads = 0
        while reads < _LAST_READS and self._serve(connection, selectors.EVENT_READ):
            reads += not connection.inbox

    def _let_go(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            connection = self._held.pop(number)
            if connection.session is not None:
                connection.session.let_go()
            self._forget(connection.process)

    def _forget(self, process: Process) -> None:
        """Stop watching a process that nothing depends on."""
        if self._departures.knows(process) or any(one.process is process for one in self._clients.values()):
            return
        self._unwatch(process)

    def _unwatch(self, process: Process) -> bool:
        if self._processes.get(process.pid) is not process:
            return False
        del self._processes[process.pid]
        self._selector.unregister(process)
        process.close()
        return True

    def _watch(self, connection: Connection) -> None:
        if not connection.closed:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.wants_to_send else 0)
            if self._selector.get_key(connection.sock).events != events:
                self._selector.modify(connection.sock, events, connection)

    def _say_farewell(self, connection: Connection, reason: str, *, again: bool) -> None:
        try:
            connection.send([p.Farewell(reason, again)])
        except KvtiersError:
            pass  # it is being closed anyway

    # --- loads that another thread answers -------------------------------------------------------------------------------

    def _announce(self, session: EngineSession, op: int) -> None:
        """On any thread: never blocks."""
        self._late.append((session, op))
        self._wake.signal()

    def _answer_late(self) -> None:
        self._wake.clear()
        ready = [self._late.popleft() for _ in range(len(self._late))]
        owners = {id(one.session): one for one in self._clients.values() if one.session is not None}
        ready.sort(key=lambda one: id(one[0]))
        for owner, group in groupby(ready, key=lambda one: id(one[0])):
            connection = owners.get(owner)
            if connection is None:
                continue
            with self._blaming(connection):
                answers = (session.late_answer(op) for session, op in group)
                connection.send([answer for answer in answers if answer is not None])
            self._watch(connection)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _wind_up(self) -> None:
        self._selector.unregister(self._listener)
        self._listener.close()
        for connection in list(self._clients.values()):
            self._take_what_arrived(connection)
            if not connection.closed:
                self._say_farewell(connection, "the service ends", again=True)
                self._end(connection, "the service ends")
        for process in list(self._processes.values()):
            self._unwatch(process)
        self._selector.close()
        self._wake.close()
