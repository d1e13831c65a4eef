"""Tokens seen elsewhere: only ever a reason, and bounded."""

from __future__ import annotations

from kvtiers.model.reasons import MissReason
from kvtiers.runtime.familiar import Familiar

TOKENS = memoryview(bytes(range(64)))
OTHER = memoryview(bytes(64))


def test_nothing_is_said_of_tokens_never_stored() -> None:
    assert Familiar().reason(TOKENS, b"model", b"salt") is None


def test_the_same_namespace_and_salt_give_no_reason() -> None:
    familiar = Familiar()
    familiar.remember(TOKENS, b"model", b"salt")
    assert familiar.reason(TOKENS, b"model", b"salt") is None
    assert familiar.reason(OTHER, b"model", b"salt") is None


def test_another_salt_is_named_before_another_namespace() -> None:
    familiar = Familiar()
    familiar.remember(TOKENS, b"other model", b"salt")
    assert familiar.reason(TOKENS, b"model", b"salt") is MissReason.NAMESPACE_CHANGED
    familiar.remember(TOKENS, b"model", b"other salt")
    assert familiar.reason(TOKENS, b"model", b"salt") is MissReason.SALT_DIFFERS


def test_it_remembers_a_bounded_number_of_prompts_and_of_chains() -> None:
    familiar = Familiar(memory=10)
    for number in range(1000):
        familiar.remember(memoryview(number.to_bytes(8, "little")), b"model", b"salt")
    for number in range(1000):
        familiar.remember(TOKENS, b"model", b"salt %d" % number)
    assert len(familiar._seen) == 10
    assert sum(map(len, familiar._seen.values())) < 20
    assert familiar.reason(memoryview((0).to_bytes(8, "little")), b"model", b"x") is None
    assert familiar.reason(TOKENS, b"model", b"salt 999") is None
    assert familiar.reason(TOKENS, b"model", b"salt 0") is MissReason.SALT_DIFFERS


def test_what_was_stored_last_is_remembered_longest() -> None:
    familiar = Familiar(memory=2)
    first, second, third = (memoryview(number.to_bytes(8, "little")) for number in range(3))
    familiar.remember(first, b"a", b"")
    familiar.remember(second, b"a", b"")
    familiar.remember(first, b"a", b"")
    familiar.remember(third, b"a", b"")
    assert familiar.reason(second, b"b", b"") is None
    assert familiar.reason(first, b"b", b"") is MissReason.NAMESPACE_CHANGED
