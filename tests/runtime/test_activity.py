"""Calls under way, and closing a session behind them."""

from __future__ import annotations

import threading

import pytest

from kvtiers.model.errors import CacheClosed
from kvtiers.runtime.activity import Activity


def test_an_idle_session_is_over_as_soon_as_it_is_shut() -> None:
    over: list[str] = []
    activity = Activity(lambda: over.append("over"))
    assert activity.is_open
    assert activity.shut()
    assert over == ["over"]
    assert activity.wait_over(0.0)
    assert not activity.is_open


def test_shutting_twice_ends_it_once() -> None:
    over: list[str] = []
    activity = Activity(lambda: over.append("over"))
    assert activity.shut()
    assert not activity.shut()
    assert over == ["over"]


def test_nobody_comes_in_any_more() -> None:
    activity = Activity(lambda: None)
    activity.shut()
    with pytest.raises(CacheClosed, match="open a new one"), activity.entered():
        pytest.fail("came in")


def test_the_last_one_out_ends_it() -> None:
    over: list[str] = []
    activity = Activity(lambda: over.append(threading.current_thread().name))
    activity.enter()
    activity.enter()
    activity.shut()
    assert not activity.wait_over(0.01)
    activity.leave()
    assert over == []
    last = threading.Thread(target=activity.leave, name="last")
    last.start()
    assert activity.wait_over(20)
    last.join(20)
    assert over == ["last"]


def test_waiting_means_until_the_end_has_been_carried_out() -> None:
    go_on = threading.Event()

    def end() -> None:
        go_on.wait(20)

    activity = Activity(end)
    activity.enter()
    activity.shut()
    last = threading.Thread(target=activity.leave)
    last.start()
    assert not activity.wait_over(0.02)
    go_on.set()
    assert activity.wait_over(20)
    last.join(20)


def test_an_end_that_fails_is_an_end_all_the_same() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    activity = Activity(fail)
    with pytest.raises(ZeroDivisionError):
        activity.shut()
    assert activity.wait_over(0.0)
