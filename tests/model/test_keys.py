"""Chunk keys: stable, chained, salted; test vectors made with hashlib alone."""

from __future__ import annotations

import hashlib
import struct
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.model.errors import InvalidArgument, LayoutMismatch
from kvtiers.model.keys import KEY_BYTES, chunk_keys, encode_tokens, root_key

DIGEST = bytes(range(32))
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def by_hand(root: bytes, token_ids: list[int], chunk_tokens: int, extras: bytes = b"") -> list[bytes]:
    keys = []
    parent = root
    for start in range(0, len(token_ids) // chunk_tokens * chunk_tokens, chunk_tokens):
        chunk = token_ids[start : start + chunk_tokens]
        parent = hashlib.sha256(parent + struct.pack(f"<{chunk_tokens}I", *chunk) + extras).digest()
        keys.append(parent)
    return keys


def test_root_is_a_hash_of_namespace_and_salt() -> None:
    assert root_key(DIGEST) == hashlib.sha256(DIGEST).digest()
    assert root_key(DIGEST, "tenant-ü") == hashlib.sha256(DIGEST + "tenant-ü".encode()).digest()
    assert root_key(DIGEST, b"\x00\xff") == hashlib.sha256(DIGEST + b"\x00\xff").digest()
    assert root_key(DIGEST, "") == root_key(DIGEST, b"") == root_key(DIGEST)


@pytest.mark.parametrize("salt", ["tenant \ud800", 7, ["a"], bytearray(b"a"), True], ids=repr)
def test_a_salt_that_is_none_is_refused(salt: Any) -> None:
    with pytest.raises(InvalidArgument, match="salt must be"):
        root_key(DIGEST, salt)


def test_keys_have_not_changed() -> None:
    """Records on disk are found by these: a change of derivation needs a new FORMAT_VERSION."""
    keys = chunk_keys(root_key(DIGEST, "s"), [1, 2, 3, 2**32 - 1, 5], 2)
    assert [key.hex() for key in keys] == [
        "d67e20ae74ed50491553305af5a876459f30cc9cd0ec44a82994846e9f44b4e9",
        "356c363570b60e5f8ebf0400dd73671b4eb1d2a00df3e7188451cd65b1ce44ef",
    ]


@given(tokens, st.integers(1, 9), st.binary(max_size=9))
def test_keys_are_chained_hashes_of_full_chunks(token_ids: list[int], size: int, extras: bytes) -> None:
    root = root_key(DIGEST)
    keys = chunk_keys(root, token_ids, size, extras=extras)
    assert keys == by_hand(root, token_ids, size, extras)
    assert all(len(key) == KEY_BYTES for key in keys)


def test_equal_prefixes_have_equal_keys_and_nothing_else_has() -> None:
    root = root_key(DIGEST)
    one = chunk_keys(root, [1, 2, 3, 4, 5, 6], 2)
    other = chunk_keys(root, [1, 2, 3, 9, 5, 6], 2)
    assert one[0] == other[0]
    assert not set(one[1:]) & set(other[1:])  # also the last chunk, whose own tokens are equal


def test_a_tail_that_fills_no_chunk_has_no_key() -> None:
    root = root_key(DIGEST)
    assert chunk_keys(root, [1, 2, 3], 4) == []
    assert chunk_keys(root, [], 4) == []
    assert len(chunk_keys(root, [1, 2, 3, 4, 5], 4)) == 1


def test_salts_extras_and_namespaces_part_the_chains() -> None:
    roots = [root_key(DIGEST), root_key(DIGEST, "a"), root_key(DIGEST, "b"), root_key(b"\x01" * 32)]
    keys = [chunk_keys(root, [1, 2], 2)[0] for root in roots]
    keys += chunk_keys(roots[0], [1, 2], 2, extras=b"image")
    assert len(set(keys)) == 5


@given(tokens)
def test_all_ways_to_hold_tokens_encode_alike(token_ids: list[int]) -> None:
    wanted = struct.pack(f"<{len(token_ids)}I", *token_ids)
    forms: list[Any] = [
        token_ids,
        tuple(token_ids),
        array("Q", token_ids),
        np.array(token_ids, dtype=np.int64),
        np.array(token_ids, dtype=">u4"),
        np.array(token_ids, dtype=np.uint64).repeat(2)[::2],
        torch.tensor(token_ids, dtype=torch.int64),
        torch.tensor(token_ids, dtype=torch.int64).repeat_interleave(2)[::2],
    ]
    assert all(bytes(encode_tokens(form)) == wanted for form in forms)


@pytest.mark.parametrize(
    "wrong",
    [
        [-1],
        [2**32],
        [1.5],
        ["1"],
        [None],
        [[1, 2]],
        "12",
        b"12345678",
        bytearray(8),
        None,
        7,
        np.array([-1]),
        np.array([2**32]),
        np.array([1.0]),
        np.array([[1, 2]]),
        np.array(["1"]),
        np.array(3),
        [True] * 16,
        (5, 0, 1, False),
        [*range(100), True],
        np.array([True]),
        torch.ones(16, 1, dtype=torch.long),
        torch.ones(1, 16, dtype=torch.long),
        torch.ones(16),
        torch.ones(16, dtype=torch.bfloat16),
        torch.ones(16, dtype=torch.bool),
        torch.tensor(3),
        torch.tensor([-1]),
    ],
    ids=repr,
)
def test_what_is_not_a_flat_row_of_token_ids_is_refused(wrong: Any) -> None:
    with pytest.raises(LayoutMismatch, match="token ids"):
        encode_tokens(wrong)
