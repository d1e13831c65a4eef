"""When a server of Redis counts as restarted, whatever it is called and wherever a name leads."""

from __future__ import annotations

from kvtiers.stores.redis.runs import Runs
from kvtiers.stores.redis.settings import Address

NAME, FIRST, SECOND = (Address(host, 6379) for host in ("kv.internal", "10.0.0.1", "10.0.0.2"))


def restarts_after(*meetings: tuple[Address, bytes]) -> int:
    runs = Runs()
    for address, run in meetings:
        runs.met(address, run)
    return runs.restarts()


def test_another_run_of_a_server_is_a_restart_once() -> None:
    assert restarts_after((FIRST, b"a"), (FIRST, b"a"), (SECOND, b"b")) == 0
    assert restarts_after((FIRST, b"a"), (FIRST, b"b"), (FIRST, b"b")) == 1
    assert restarts_after((FIRST, b"a"), (FIRST, b"b"), (FIRST, b"c")) == 2


def test_a_name_that_leads_to_servers_in_turn_has_not_been_restarted() -> None:
    """As the configuration endpoint of a cluster does, whose servers are met under their own addresses too."""
    servers = ((NAME, b"a"), (FIRST, b"a"), (SECOND, b"b"))
    assert restarts_after(*servers, *[(NAME, b"b"), (NAME, b"a")] * 10) == 0
    assert restarts_after(*servers, (NAME, b"b"), (SECOND, b"c"), (NAME, b"c"), (NAME, b"a")) == 1


def test_a_name_that_was_met_first_ends_what_is_known_once_a_server() -> None:
    assert restarts_after(*[(NAME, b"a"), (NAME, b"b"), (NAME, b"c")] * 10) == 2


def test_a_server_that_does_not_say_is_not_counted() -> None:
    assert restarts_after((FIRST, b"a"), (FIRST, b""), (FIRST, b"a")) == 0


def test_only_so_many_are_remembered() -> None:
    runs = Runs()
    for number in range(5000):
        runs.met(Address(f"pod-{number}", 1), b"%d" % number)
    assert len(runs._runs) == len(runs._servers) == 1024
    runs.met(Address("pod-4999", 1), b"new")
    assert runs.restarts() == 1
