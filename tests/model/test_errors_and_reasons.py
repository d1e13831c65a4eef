"""One error tree, two closed lists, four tiers."""

from __future__ import annotations

import pickle

import pytest

from kvtiers.model import errors
from kvtiers.model.errors import (
    ConfigError,
    DoesNotFit,
    InvalidArgument,
    KvtiersError,
    LayoutMismatch,
    TierDisabled,
    UnknownTier,
)
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


def test_whoever_catches_the_root_has_caught_everything() -> None:
    assert all(issubclass(kind, KvtiersError) for kind in CLASSES)
    assert not issubclass(KvtiersError, OSError | ValueError)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_tree_is_drawn_as_it_is(kind: type[Exception]) -> None:
    lines = (errors.__doc__ or "").splitlines()
    (drawn,) = [line for line in lines if kind.__name__ in line.replace("─", " ").split()]
    depth = len(drawn) - len(drawn.lstrip(" │├└─"))
    above = [line for line in lines[: lines.index(drawn)] if line.strip(" │├└─")]
    parents = [line for line in above if len(line) - len(line.lstrip(" │├└─")) < depth]
    if kind is not KvtiersError:
        assert kind.__mro__[1].__name__ in parents[-1].replace("─", " ").split()


def test_a_wrong_argument_is_a_value_error_too() -> None:
    wrong = {kind for kind in CLASSES if issubclass(kind, ValueError)}
    assert wrong == {InvalidArgument, LayoutMismatch, UnknownTier, TierDisabled}
    assert all(issubclass(kind, InvalidArgument) for kind in wrong)


@pytest.mark.parametrize("kind", [ConfigError, DoesNotFit])
def test_a_config_error_survives_pickling_with_all_it_says(kind: type[ConfigError]) -> None:
    error = kind(["storage.cpu.buffer_size: too big", "storage.disk.path: not writable"], source="cache.yaml")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.problems, again.source, str(again)) == (error.problems, error.source, str(error))


def test_a_config_error_lists_every_problem() -> None:
    assert str(ConfigError(["a", "b"], source="x.yaml")) == "x.yaml: 2 problems\n  - a\n  - b"
    assert str(ConfigError(["a"])) == "configuration: 1 problem\n  - a"


def test_miss_reasons_are_a_closed_list() -> None:
    wanted = """NEVER_SEEN EVICTED EXPIRED QUOTA NOT_ADMITTED IN_FLIGHT STAGING_TIMEOUT NO_SLOT TIER_OPEN CORRUPT
        NAMESPACE_CHANGED SALT_DIFFERS CHEAPER_TO_RECOMPUTE GROUP_STATE_MISSING PARTIAL_CHUNK DISABLED"""
    assert [reason.name for reason in MissReason] == wanted.split()


def test_refusals_are_a_closed_list() -> None:
    wanted = "PRESENT IN_FLIGHT QUOTA NO_SLOT QUEUE_FULL NOT_ADMITTED CHAIN_BROKEN TIER_OPEN CLOSED DISABLED"
    assert [refusal.name for refusal in Refusal] == wanted.split()


@pytest.mark.parametrize("reason", [*MissReason, *Refusal], ids=repr)
def test_a_reason_is_its_own_label(reason: MissReason | Refusal) -> None:
    assert reason.value == reason.name.lower() == str(reason)


def test_tiers_are_consulted_nearest_first() -> None:
    assert [str(tier) for tier in Tier] == ["gpu", "cpu", "disk", "remote"]
