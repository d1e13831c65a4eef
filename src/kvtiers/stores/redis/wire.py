"""One connection to one server: commands out, replies in, large values straight from and into the caller's memory.

redis-py connects and does TLS. What comes after is here, on its socket, because redis-py
returns values in fresh memory (.50 CPU seconds a GB at its best, the copy out of it included, .25 with `recv_into`, for 4 MiB:
docs/decisions/remote.md), and
because its time-outs begin anew with every byte received: here each call has one deadline, however slowly the server sends.

The protocol is RESP2: nothing arrives unasked. A wire is used by one thread at a time; `close` may be called by any.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from kvtiers.stores.redis.settings import Address

_BUFFER_BYTES: Final = 16_384
_LONGEST_LINE: Final = 65_536
_SEND_BYTES: Final = 1 << 20
_LARGEST_REPLY: Final = 16 << 20
_END: Final = b"\r\n"
_JOIN_BELOW: Final = 16_384

Argument = bytes | memoryview


class ErrorReply(NamedTuple):
    """What a server says when it refuses: "OOM command not allowed…"."""

    text: str

    @property
    def code(self) -> str:
        """Its first word."""
        return self.text.split(" ", 1)[0]


Reply = int | bytes | ErrorReply | None | list["Reply"]
"""An integer, a string, a refusal, nothing, or several."""


class WireBroken(Exception):
    """The connection is of no use any more: closed, out of step, or past its deadline (`timed_out`)."""

    def __init__(self, reason: str, *, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out
        self.refusal: ErrorReply | None = None
        """What the server said before it hung up on what we were sending."""


class WrongLength(WireBroken):
    """A value has not as many bytes as the memory for it."""


class Wire:
    """A connection that redis-py has made ready."""

    def __init__(self, connection: Any, address: Address) -> None:
        """`connection`: a connected `redis.connection.Connection`."""
        self.address = address
        self.run = b""
        """Which run of the server this is; empty if it does not say."""
        self._connection = connection  # it closes its socket when it is forgotten
        self._socket: socket.socket = connection._sock  # noqa: SLF001 - as its parsers do: it has no other way to give it
        self._buffer = bytearray(_BUFFER_BYTES)
        self._start = self._stop = 0
        self._owed = 0
        """Replies that have not been read to their end."""

    def send(self, commands: Sequence[Sequence[Argument]], deadline: float) -> None:
        """Commands of which each is a name and its arguments. Raises WireBroken."""
        self._owed += len(commands)
        small = b""  # what lies between two large values goes out at once
        for command in commands:
            small += b"*%d\r\n" % len(command)
            for argument in command:
                small += b"$%d\r\n" % len(argument)
                if len(argument) < _JOIN_BELOW:
                    small += bytes(argument) + _END
                else:
                    self._send(memoryview(small), deadline)
                    self._send(memoryview(argument), deadline)
                    small = _END
        self._send(memoryview(small), deadline)

    def ask(self, commands: Sequence[Sequence[bytes]], deadline: float) -> list[Reply]:
        """The replies to several small commands in one round trip."""
        self._owed += len(commands)
        words: list[bytes] = []
        for command in commands:
            words.append(b"*%d\r\n" % len(command))
            words += [b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in command]
        self._send(memoryview(b"".join(words)), deadline)
        return [self.reply(deadline) for _ in commands]

    def reply(self, deadline: float) -> Reply:
        """The next reply. Raises WireBroken."""
        reply = self._reply(deadline)
        self._owed -= 1
        return reply

    def value_into(self, memory: memoryview, deadline: float) -> ErrorReply | bool:
        """A value into `memory`, whose length it must have; False if there is none. Raises WireBroken, WrongLength."""
        line = self._line(deadline)
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            self._owed -= 1
            return ErrorReply(rest.decode("utf-8", "replace"))
        if kind != b"$":
            raise self._broken("it answered to GET with something that is no value")
        length = self._number(rest)
        if length < 0:
            self._owed -= 1
            return False
        if length != len(memory):
            self.close()
            raise WrongLength(f"{length} bytes instead of {len(memory)}")
        self._fill(memory, deadline)
        self._end(deadline)
        self._owed -= 1
        return True

    def is_idle(self) -> bool:
        """Whether it is open and in step: every reply was read, and nothing else has arrived."""
        if self._owed or self._start != self._stop or self._socket.fileno() < 0:
            return False
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLIN)
        except (OSError, ValueError):
            return False
        return not poll.poll(0)

    def close(self) -> None:
        """Whoever waits on it gets WireBroken."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # of TLS: no farewell, which might block

    def dispose(self) -> None:
        """Close it for good; by the thread that used it last."""
        self.close()
        self._connection.disconnect()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _reply(self, deadline: float) -> Reply:
        line = self._line(deadline)
        kind, rest = line[:1], line[1:]
        if kind == b":":
            return self._number(rest)
        if kind == b"$":
            length = self._number(rest)
            if length < 0:
                return None
            if length > _LARGEST_REPLY:
                raise self._broken(f"it answered with {length} bytes where few were asked for")
            value = bytearray(length)
            self._fill(memoryview(value), deadline)
            self._end(deadline)
            return bytes(value)
        if kind == b"*":
            count = self._number(rest)
            return None if count < 0 else [self._reply(deadline) for _ in range(count)]
        if kind == b"+":
            return rest
        if kind == b"-":
            return ErrorReply(rest.decode("utf-8", "replace"))
        raise self._broken("it does not speak the Redis protocol")

    def _send(self, data: memoryview, deadline: float) -> None:
        data = data.cast("B") if data.format != "B" else data
        sent = 0
        try:
            while sent < len(data):
                self._socket.settimeout(self._left(deadline))
                sent += self._socket.send(data[sent : sent + _SEND_BYTES])
        except OSError as error:
            lost = self._lost(error)
            if not lost.timed_out:
                lost.refusal = self._last_words(deadline)
            raise lost from None

    def _last_words(self, deadline: float) -> ErrorReply | None:
        """The first refusal among what has arrived; nothing more is waited for, as the connection is closed."""
        with suppress(WireBroken):
            for _ in range(self._owed):
                reply = self._reply(deadline)
                if isinstance(reply, ErrorReply):
                    return reply
        return None

    def _receive(self, memory: memoryview, deadline: float) -> int:
        try:
            self._socket.settimeout(self._left(deadline))
            count = self._socket.recv_into(memory)
        except OSError as error:
            raise self._lost(error) from None
        if not count:
            raise self._broken("it closed the connection")
        return count

    def _fill(self, memory: memoryview, deadline: float) -> None:
        done = min(self._stop - self._start, len(memory))
        memory[:done] = memoryview(self._buffer)[self._start : self._start + done]
        self._start += done
        while done < len(memory):
            done += self._receive(memory[done:], deadline)

    def _line(self, deadline: float) -> bytes:
        """The next line, without its end."""
        end = self._buffer.find(_END, self._start, self._stop)
        if end < 0:
            return self._long_line(deadline)
        line = bytes(self._buffer[self._start : end])
        self._start = end + 2
        return line

    def _long_line(self, deadline: float) -> bytes:
        """A line whose end has not arrived yet."""
        line = bytearray()
        while True:
            line += self._buffer[self._start : self._stop]
            self._start = self._stop = 0
            if len(line) > _LONGEST_LINE:
                raise self._broken("it does not speak the Redis protocol")
            self._stop = self._receive(memoryview(self._buffer), deadline)
            seen = len(line)
            line += self._buffer[: self._stop]
            end = line.find(_END, max(0, seen - 1))
            if end >= 0:
                self._start = end + 2 - seen
                return bytes(line[:end])
            self._start = self._stop

    def _end(self, deadline: float) -> None:
        if self._line(deadline):
            raise self._broken("a value is longer than it was said to be")

    def _number(self, text: bytes) -> int:
        try:
            return int(text)
        except ValueError:
            raise self._broken("it does not speak the Redis protocol") from None

    def _left(self, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _lost(self, error: OSError) -> WireBroken:
        if isinstance(error, TimeoutError):
            return self._broken("it did not answer in time", timed_out=True)
        return self._broken(f"the connection was lost ({error.strerror or error})")

    def _broken(self, reason: str, *, timed_out: bool = False) -> WireBroken:
        self.close()
        return WireBroken(reason, timed_out=timed_out)
