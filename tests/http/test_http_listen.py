from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from kvtiers.http.server import listen, read_token
from kvtiers.model.errors import ConfigError


def test_a_port_already_taken_is_named_with_its_key() -> None:
    with listen("127.0.0.1", 0, has_token=False) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"observability.metrics_port = {port}: .*in use"):
            listen("127.0.0.1", port, has_token=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_an_address_that_others_reach_needs_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="token_file"):
        listen(host, 0, has_token=False)


def test_a_name_is_no_address() -> None:
    with pytest.raises(ConfigError, match="an IP address"):
        listen("node-7.cluster", 0, has_token=True)


def test_a_token_file_is_read_if_it_is_private(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("correct-horse\n")
    path.chmod(0o600)
    assert read_token(path) == "correct-horse"
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(path)
    path.chmod(0o600)
    for content in ("", "two words", "two\nlines", "nul\0"):
        path.write_text(content)
        with pytest.raises(ConfigError, match="one line"):
            read_token(path)
    path.unlink()
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        read_token(path)


def test_answers_on_a_kept_connection_are_not_held_back() -> None:
    with listen("127.0.0.1", 0, has_token=False) as listening:
        assert listening.proto == socket.IPPROTO_TCP, "or asyncio leaves Nagle's algorithm on"
