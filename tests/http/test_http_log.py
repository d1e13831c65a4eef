"""The log can't be filled through the port."""

from __future__ import annotations

import logging
import socket

import pytest

from kvtiers.http.app import make_app
from kvtiers.http.seldom import UVICORN, Seldom
from kvtiers.http.server import HttpServer, listen
from kvtiers.testing.operated import OperatedCache


def said(text: str, at: float, level: int = logging.WARNING) -> logging.LogRecord:
    record = logging.LogRecord(UVICORN, level, "", 0, text, (), None)
    record.created = at
    return record


def test_noise_on_the_port_is_a_line_and_not_a_line_each(
    operated: OperatedCache, caplog: pytest.LogCaptureFixture
) -> None:
    listening = listen("127.0.0.1", 0, has_token=False)
    with HttpServer(make_app(operated), listening):
        for _ in range(20):
            with socket.create_connection(listening.getsockname(), timeout=10) as one:
                one.sendall(b"\x00\r\n\r\n")
                assert one.recv(4096).startswith(b"HTTP/1.1 400")
    assert len([one for one in caplog.records if one.name == UVICORN]) <= 1


def test_the_first_of_each_minute_says_how_many_were_left_out() -> None:
    seldom = Seldom()
    records = [said("no HTTP", at) for at in (0.0, 1.0, 59.0, 61.0, 130.0)]
    assert [one.getMessage() for one in records if seldom.filter(one)] == [
        "no HTTP",
        "no HTTP (2 more since the last such line)",
        "no HTTP",
    ]


def test_errors_and_other_lines_are_not_left_out() -> None:
    seldom = Seldom()
    assert seldom.filter(said("no HTTP", 0.0))
    assert seldom.filter(said("too many", 0.0))
    assert all(seldom.filter(said("a bug", 0.0, logging.ERROR)) for _ in range(3))


def test_what_is_remembered_is_bounded() -> None:
    seldom = Seldom()
    assert all(seldom.filter(said(f"line {number}", 0.0)) for number in range(1000))
    assert len(seldom._seen) <= 64
