"""Slots are used again only when nobody can write to them any more, and then they are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtiers.node.departures import Departures


def test_process_on_its_own_is_let_go_of_when_it_is_gone() -> None:
    books: Departures[int, str] = Departures()
    books.joined(1, "p", b"")
    books.lost(1)  # a socket's end proves nothing
    assert books.gone("q") == []
    assert books.gone("p") == [1]
    assert books.gone("p") == []
    assert not books.knows("p")


def test_lost_scheduler_waits_for_its_workers() -> None:
    books: Departures[int, str] = Departures()
    for client, process in enumerate(("scheduler", "worker", "worker 2"), 1):
        books.joined(client, process, b"engine")
    assert books.gone("scheduler") == []
    assert books.gone("worker") == []
    assert sorted(books.gone("worker 2")) == [1, 2, 3]


def test_other_engines_are_not_waited_for() -> None:
    books: Departures[int, str] = Departures()
    books.joined(1, "p", b"engine")
    books.joined(2, "q", b"another")
    assert books.gone("p") == [1]


def test_worker_that_comes_later_is_not_waited_for() -> None:
    books: Departures[int, str] = Departures()
    books.joined(1, "scheduler", b"engine")
    books.lost(1)
    books.joined(2, "worker", b"engine")
    assert books.gone("scheduler") == [1]


def test_process_that_reconnects_settles_its_old_connection() -> None:
    books: Departures[int, str] = Departures()
    books.joined(1, "p", b"")
    books.lost(1)
    books.joined(2, "p", b"")
    assert books.settled(1) == [1]
    assert books.settled(1) == []
    assert books.knows("p")


def test_goodbye_of_a_worker_ends_the_wait_for_it() -> None:
    books: Departures[int, str] = Departures()
    books.joined(1, "scheduler", b"engine")
    books.joined(2, "worker", b"engine")
    assert books.gone("scheduler") == []
    assert sorted(books.goodbye(2)) == [1, 2]


def test_a_process_that_has_nothing_open_any_more_is_still_waited_for() -> None:
    books: Departures[int, str] = Departures()
    books.joined(1, "worker", b"engine")
    books.joined(2, "scheduler", b"engine")
    books.lost(2)
    assert books.settled(1) == [1]
    assert books.gone("scheduler") == []
    assert books.knows("worker"), "it may still write to what the scheduler was given"
    assert books.gone("worker") == [2]
    assert not books.knows("worker")


def test_goodbye_on_one_of_two_connections_says_nothing_about_the_process() -> None:
    books: Departures[int, str] = Departures()
    books.joined(1, "scheduler", b"engine")
    books.joined(2, "worker", b"engine")
    books.joined(3, "worker", b"engine")
    books.gone("scheduler")
    assert books.goodbye(2) == [2]
    assert sorted(books.gone("worker")) == [1, 3]


class Model:
    """The rule in plain words: a lost client waits for every process that its engine had at that time and that may still write."""

    def __init__(self) -> None:
        self.alive = set(range(5))
        self.engine: dict[int, object] = {}
        self.process: dict[int, int] = {}
        self.waits: dict[int, set[int]] = {}
        self.last = 0

    def joined(self, process: int, engine: bytes) -> int:
        self.last += 1
        self.engine[self.last] = engine or ("alone", process)
        self.process[self.last] = process
        return self.last

    def mates(self, client: int) -> set[int]:
        return {other for other in self.engine if self.engine[other] == self.engine[client]}

    def lost(self, client: int) -> None:
        if client in self.engine and client not in self.waits:
            self.waits[client] = {self.process[mate] for mate in self.mates(client)} & self.alive

    def gone(self, process: int) -> set[int]:
        for client in [one for one, owner in self.process.items() if owner == process]:
            self.lost(client)
        self.alive.discard(process)
        return self.ended(set(self.waits), process)

    def settled(self, client: int) -> set[int]:
        released = {client} & self.engine.keys()
        self.waits.pop(client, None)
        self.engine.pop(client, None)
        return released

    def goodbye(self, client: int) -> set[int]:
        if client not in self.engine:
            return set()
        mates, process = self.mates(client) - {client}, self.process[client]
        released = self.settled(client)
        if not any(self.process[mate] == process for mate in mates):
            released |= self.ended(mates & self.waits.keys(), process)
        return released

    def ended(self, clients: set[int], process: int) -> set[int]:
        for client in clients:
            self.waits[client].discard(process)
        released = {client for client in clients if not self.waits[client]}
        for client in released:
            self.settled(client)
        return released


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("joined", "lost", "settled", "goodbye", "gone")),
        st.integers(0, 4),
        st.sampled_from((b"", b"a", b"b")),
    ),
    max_size=60,
)


@given(STEPS)
def test_each_client_is_let_go_of_once_and_never_while_a_process_may_write(
    steps: list[tuple[str, int, bytes]],
) -> None:
    books: Departures[int, int] = Departures()
    model = Model()
    let_go: list[int] = []
    for what, number, engine in steps:
        client = number % max(model.last, 1) + 1
        released: list[int] = []
        match what:
            case "joined" if number in model.alive:
                books.joined(model.joined(number, engine), number, engine)
            case "lost":
                books.lost(client)
                model.lost(client)
            case "gone" if number in model.alive:
                released = books.gone(number)
                assert set(released) == model.gone(number)
            case "settled":
                released = books.settled(client)
                assert set(released) == model.settled(client)
            case "goodbye":
                released = books.goodbye(client)
                assert set(released) == model.goodbye(client)
            case _:
                pass
        let_go += released
    assert len(let_go) == len(set(let_go))
