"""The yardstick itself: a digest changes with any bit of its chunk and layer, and with no other."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvtiers.ops.demo.stored import StoredKV, kv_rows, logits_digest

LAYERS, HEADS, TOKENS, DIM, CHUNK = 3, 2, 10, 4, 4


def make_past(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return SimpleNamespace(
        layers=[
            SimpleNamespace(
                keys=torch.randn(1, HEADS, TOKENS, DIM).to(dtype),
                values=torch.randn(1, HEADS, TOKENS, DIM).to(dtype),
            )
            for _ in range(LAYERS)
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_element_that_changes_changes_the_digest_of_its_chunk_and_layer_only(dtype: torch.dtype) -> None:
    past = make_past(dtype)
    before = kv_rows(past, TOKENS, CHUNK)
    assert (len(before), {len(row) for row in before}) == (2, {LAYERS})
    for layer, part, head, token in product(range(LAYERS), ("keys", "values"), range(HEADS), range(8)):
        plane = getattr(past.layers[layer], part)
        kept = plane[0, head, token, 1].clone()
        plane[0, head, token, 1] = 100.0
        after = kv_rows(past, TOKENS, CHUNK)
        changed = {(c, i) for c in range(2) for i in range(LAYERS) if before[c][i] != after[c][i]}
        assert changed == {(token // CHUNK, layer)}
        plane[0, head, token, 1] = kept
    assert kv_rows(past, TOKENS, CHUNK) == before


def test_keys_and_values_exchanged_are_noticed() -> None:
    past, exchanged = make_past(), make_past()
    for layer in exchanged.layers:
        layer.keys, layer.values = layer.values, layer.keys
    assert kv_rows(past, TOKENS, CHUNK) != kv_rows(exchanged, TOKENS, CHUNK)


def test_strides_do_not_matter() -> None:
    past, strided = make_past(), make_past()
    for layer in strided.layers:
        layer.keys = layer.keys.transpose(1, 2).contiguous().transpose(1, 2)
    assert kv_rows(past, TOKENS, CHUNK) == kv_rows(strided, TOKENS, CHUNK)


def test_only_full_chunks_within_the_tokens_have_a_digest() -> None:
    past = make_past()
    assert kv_rows(past, 7, CHUNK) == kv_rows(past, TOKENS, CHUNK)[:1]
    assert kv_rows(past, 3, CHUNK) == ()


def test_negative_zero_is_another_bit_pattern() -> None:
    assert logits_digest(torch.tensor([0.0])) != logits_digest(torch.tensor([-0.0]))


def test_longest_stored_prefix_is_known() -> None:
    stored = StoredKV(CHUNK)
    rows = (("a",), ("b",))
    stored.remember(range(9), rows)
    assert stored.known(range(9)) == rows
    assert stored.known([*range(4), 99, 98, 97, 96]) == rows[:1]
    assert stored.known([99, *range(1, 9)]) == ()
    assert stored.reusable(range(9)) == 8
    assert stored.reusable(range(8)) == 7  # the last token is always computed
    assert stored.reusable([99] * 8) == 0


def test_what_was_stored_first_stays() -> None:
    stored = StoredKV(CHUNK)
    stored.remember(range(4), (("a",),))
    stored.remember(range(8), (("other",), ("b",)))
    assert stored.known(range(8)) == (("a",), ("b",))
