"""Connections to an InfiniStore server. One is used by one call at a time, and every wait on it ends at the call's deadline.

**The server dies when a connection ends on which it still has two things to send** (0.2.35 closes it twice and aborts), and everything it holds is gone. So a connection on which
an answer is owed is not closed: a daemon thread takes what still arrives, into memory of its own, and closes it then. How many there may be is bounded;
beyond that no call begins. Nothing arrives in a caller's memory after its call. A process that is killed in the middle of a read can't be so polite.

An idle connection that the server has closed meanwhile is noticed before it is used.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from kvtiers.model.errors import StoreTransient, StoreUnavailable
from kvtiers.stores.call_time import CallTime
from kvtiers.stores.infinistore.frames import LENGTH, STATUS, Status

_SMALLEST_WAIT_S: Final = 0.001
_SCRATCH_BYTES: Final = 64 << 10
_KEEPALIVE_S: Final = 15
_DRAIN_S: Final = 600.0
"""Without a byte, an answer will not come any more: a request that was cut off has none."""
_DRAIN_UNCOUNTED_S: Final = 5.0
"""Likewise, where how much is owed is not known any more."""


class Channel:
    """A connection during one call. Its errors are those of `socket`; TimeoutError at the deadline."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._socket = connection
        self._deadline = deadline
        self._head = bytearray()
        self._ahead = bytearray()
        self._patience_s = _DRAIN_S
        self._left = 0
        self._value_owed = False
        self._bytes_owed = 0

    @property
    def owed(self) -> bool:
        """The server sends, or will send, something that was not read to its end."""
        return self._value_owed or self._bytes_owed > 0

    def send(self, data: bytes | memoryview) -> None:
        """All of it."""
        self._set_timeout()
        self._socket.sendall(data)

    def expect(self, nbytes: int) -> None:
        """The server owes so many bytes for what was, or is going to be, sent: `receive` will read them."""
        self._bytes_owed += nbytes

    def lose_count(self) -> None:
        """An error was received where more was expected: the rest of the answers may be shorter than said."""
        self._patience_s = _DRAIN_UNCOUNTED_S

    def receive(self, nbytes: int) -> bytes:
        """Exactly so many. What else has come of what is owed is kept for the next time."""
        while len(self._ahead) < nbytes:
            piece = memoryview(bytearray(max(nbytes - len(self._ahead), self._bytes_owed)))
            count = self._receive_some(piece)
            self._bytes_owed = max(0, self._bytes_owed - count)
            self._ahead += piece[:count]
        data = bytes(self._ahead[:nbytes])
        del self._ahead[:nbytes]
        return data

    def ask_for_value(self, request: bytes) -> tuple[int, int]:
        """Send it, and read the answer's status and the bytes of the value that `receive_value` has to read; 0 unless it was found."""
        self._value_owed = True
        self._head.clear()
        self.send(request)
        return self._receive_head()

    def receive_value(self, memory: memoryview) -> None:
        """Fill it with the next bytes of the value."""
        done = 0
        while done < len(memory):
            count = self._receive_some(memory[done:])
            done += count
            self._left -= count
        self._value_owed = self._left > 0

    def drain(self) -> None:
        """Read what is owed to its end, while something arrives now and then; from another thread, when the call has ended."""
        self._deadline = math.inf
        scratch = memoryview(bytearray(_SCRATCH_BYTES))
        while self._bytes_owed:
            self._bytes_owed -= self._receive_some(scratch[: self._bytes_owed])
        if not self._value_owed:
            return
        self._receive_head()
        while self._value_owed:
            self.receive_value(scratch[: min(self._left, _SCRATCH_BYTES)])

    def _receive_head(self) -> tuple[int, int]:
        """Goes on where an earlier try stopped."""
        self._receive_up_to(self._head, STATUS.size)
        (status,) = STATUS.unpack_from(self._head)
        if status != Status.OK:
            self._value_owed = False
            return int(status), 0
        if len(self._head) < STATUS.size + LENGTH.size:
            self._receive_up_to(self._head, STATUS.size + LENGTH.size)
            (self._left,) = LENGTH.unpack_from(self._head, STATUS.size)
        self._value_owed = self._left > 0
        return int(status), self._left

    def _receive_up_to(self, data: bytearray, nbytes: int) -> None:
        while len(data) < nbytes:
            piece = memoryview(bytearray(nbytes - len(data)))
            data += piece[: self._receive_some(piece)]

    def _receive_some(self, memory: memoryview) -> int:
        self._set_timeout()
        count = self._socket.recv_into(memory)
        if not count:
            raise ConnectionResetError("the server has closed the connection")
        return count

    def _set_timeout(self) -> None:
        if self._deadline == math.inf:
            self._socket.settimeout(self._patience_s)
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(max(left, _SMALLEST_WAIT_S))


class Channels:
    """Connections to one server, kept for the next call."""

    def __init__(self, host: str, port: int, timeout_s: float, most_owed: int) -> None:
        """`timeout_s`: for a call, from dialling to the last byte. `most_owed`: connections that are waited for after their call."""
        self._address = (host, port)
        self._timeout_s = timeout_s
        self.time = CallTime()
        """May end what a thread does sooner."""
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._most_owed = most_owed
        self._num_owed = 0
        self.ended = 0
        """Times that the server was found to have ended a connection, which it does when it dies; its values are in its memory."""
        self._open = False

    def open(self) -> None:
        """Let calls begin."""
        with self._lock:
            self._open = True

    @contextmanager
    def use(self) -> Iterator[Channel]:
        """A connection for one call. Raises StoreUnavailable if there is no server, StoreTransient if it was too slow or went away."""
        deadline = min(self.time.until, time.monotonic() + self._timeout_s)
        connection = self._take(deadline)
        channel = Channel(connection, deadline)
        try:
            yield channel
        except OSError as error:
            timed_out = isinstance(error, TimeoutError)
            if not timed_out:
                self._count_ended()
            self._end(connection, channel if timed_out else None)
            self._check_open()
            what = f"no answer within {self._timeout_s:g} s" if timed_out else str(error)
            raise StoreTransient(f"{self._name}: {what}") from error
        except BaseException:
            self._end(connection, channel)
            raise
        self._give_back(connection)

    def close(self) -> None:
        """Idempotent. Calls under way end by their deadline."""
        with self._lock:
            self._open = False
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def stats(self) -> Mapping[str, int]:
        """`answers_owed`: connections that wait for the rest of a value nobody wants any more."""
        with self._lock:
            return {"answers_owed": self._num_owed}

    # --- inside -------------------------------------------------------------------------------------------------------

    def _count_ended(self) -> None:
        with self._lock:
            self.ended += 1

    @property
    def _name(self) -> str:
        host, port = self._address
        return f"InfiniStore at [{host}]:{port}" if ":" in host else f"InfiniStore at {host}:{port}"

    def _check_open(self) -> None:
        if not self._open:
            raise StoreUnavailable("the InfiniStore client is closed")

    def _take(self, deadline: float) -> socket.socket:
        while True:
            with self._lock:
                self._check_open()
                if self._num_owed >= self._most_owed:
                    raise StoreTransient(f"{self._name} owes {self._num_owed} answers")
                if not self._idle:
                    break
                connection = self._idle.pop()
            if _is_quiet(connection):
                return connection
            connection.close()
            self._count_ended()
        return self._dial(max(deadline - time.monotonic(), _SMALLEST_WAIT_S))

    def _dial(self, timeout_s: float) -> socket.socket:
        try:
            connection = socket.create_connection(self._address, timeout_s)
        except socket.gaierror as error:
            raise StoreUnavailable(
                f"the host of {self._name} is not known ({error.strerror}); check storage.remote.endpoint"
            ) from error
        except OSError as error:
            raise StoreUnavailable(
                f"{self._name} can't be reached ({error.strerror or error}); is it running there?"
            ) from error
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1
        )  # a host that vanished owes nothing for long
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
        return connection

    def _give_back(self, connection: socket.socket) -> None:
        with self._lock:
            if self._open:
                self._idle.append(connection)
                return
        connection.close()

    def _end(self, connection: socket.socket, channel: Channel | None) -> None:
        """Close it, now or when all that is owed on it has arrived. None: it is broken."""
        if channel is None or not channel.owed:
            connection.close()
            return
        with self._lock:
            self._num_owed += 1
        threading.Thread(
            target=self._drain, args=(connection, channel), name="kvtiers-infinistore-drain", daemon=True
        ).start()

    def _drain(self, connection: socket.socket, channel: Channel) -> None:
        try:
            channel.drain()
        except OSError:
            pass  # the server is gone
        finally:
            connection.close()
            with self._lock:
                self._num_owed -= 1


def _is_quiet(connection: socket.socket) -> bool:
    """Whether an idle connection is still there: nobody owes us anything on it."""
    try:
        connection.settimeout(0)
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
