"""Prefill with reuse on a real (small, random) Llama: what comes out of the cache is what was computed, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from kvtiers.config import CacheConfig
from kvtiers.integrations.transformers import CachedCausalLM, Prefill, Reuse, Split
from kvtiers.model.errors import CacheClosed, LayoutMismatch
from kvtiers.model.namespace import Namespace
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.runtime.results import PendingLoad
from kvtiers.testing.disk_damage import flip_bit, record_files

MakeLM = Callable[..., CachedCausalLM]
MakeConfig = Callable[..., CacheConfig]
SaveModel = Callable[[Path, int], None]


def same_kv(left: Prefill, right: Prefill, tokens: int | None = None) -> bool:
    """Whether the KV of the first `tokens` tokens is the same to the bit."""
    pairs = zip(left.past.layers, right.past.layers, strict=True)
    return all(
        torch.equal(a.keys[:, :, :tokens], b.keys[:, :, :tokens])
        and torch.equal(a.values[:, :, :tokens], b.values[:, :, :tokens])
        for a, b in pairs
    )


def store_all(lm: CachedCausalLM, prompt: Sequence[int], **more: Any) -> Prefill:
    cold = lm.prefill(prompt, reuse=Reuse.RECOMPUTE, **more)
    receipt = lm.store(cold)
    assert receipt.refusal is None
    lm.cache.flush()
    return cold


def count_passes(lm: CachedCausalLM) -> list[int]:
    """Tokens of each forward pass from now on."""
    lengths: list[int] = []
    lm.model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


@pytest.mark.parametrize("tier", [Tier.GPU, Tier.CPU, Tier.DISK])
def test_hit_from_each_tier_gives_logits_and_kv_of_a_cold_prefill_to_the_bit(
    open_lm: MakeLM, prompt: list[int], tmp_path: Path, tier: Tier, config_of: MakeConfig
) -> None:
    lm = open_lm(config_of(tmp_path, gpu=True))
    cold = store_all(lm, prompt)
    for nearer in (Tier.GPU, Tier.CPU):
        if nearer is tier:
            break
        lm.cache.evict(nearer)
        lm.cache.flush()
    warm = lm.prefill(prompt)
    assert (warm.reused_tokens, warm.tiers, warm.stopped_by) == (64, (tier,) * 4, MissReason.PARTIAL_CHUNK)
    assert torch.equal(warm.logits, cold.logits)
    assert same_kv(warm, cold)


def test_hit_survives_a_restart(
    open_lm: MakeLM, prompt: list[int], tmp_path: Path, config_of: MakeConfig
) -> None:
    first = open_lm(config_of(tmp_path))
    cold = store_all(first, prompt)
    first.close()
    warm = open_lm(config_of(tmp_path)).prefill(prompt)
    assert warm.tiers == (Tier.DISK,) * 4
    assert torch.equal(warm.logits, cold.logits)
    assert same_kv(warm, cold)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_kv_comes_back_to_the_bit(
    open_lm: MakeLM, prompt: list[int], dtype: torch.dtype
) -> None:
    lm = open_lm(dtype=dtype)
    cold = store_all(lm, prompt)
    warm = lm.prefill(prompt)
    assert warm.reused_tokens == 64
    assert warm.past.layers[0].keys.dtype is dtype
    assert torch.equal(warm.logits, cold.logits)
    assert same_kv(warm, cold)


def test_only_what_is_not_cached_is_computed(open_lm: MakeLM, prompt: list[int]) -> None:
    lm = open_lm()
    store_all(lm, prompt[:40])
    passes = count_passes(lm)
    assert lm.prefill(prompt).reused_tokens == 32
    assert passes == [16, 16, 6]


def test_prompt_cached_as_a_whole_computes_its_last_token_again(open_lm: MakeLM, prompt: list[int]) -> None:
    lm = open_lm()
    cold = store_all(lm, prompt[:64])
    passes = count_passes(lm)
    warm = lm.prefill(prompt[:64])
    assert passes == [1]
    assert (warm.reused_tokens, len(warm.tiers), warm.stopped_by) == (63, 4, None)
    assert same_kv(warm, cold, 63)
    assert warm.past.get_seq_length() == 64
    assert torch.allclose(warm.logits, cold.logits, atol=1e-4)  # another shape of pass, other rounding
    receipt = lm.store(warm)
    assert (receipt.accepted, receipt.refusal) == (0, None)


def test_prompt_shorter_than_a_chunk_is_computed(open_lm: MakeLM, prompt: list[int]) -> None:
    lm = open_lm()
    short = lm.prefill(prompt[:10])
    assert (short.reused_tokens, short.tiers, short.stopped_by) == (0, (), MissReason.PARTIAL_CHUNK)
    assert lm.store(short).accepted == 0


def test_miss_says_why(open_lm: MakeLM, prompt: list[int]) -> None:
    lm = open_lm()
    assert lm.prefill(prompt).stopped_by is MissReason.NEVER_SEEN
    assert lm.prefill(prompt, reuse=Reuse.RECOMPUTE).stopped_by is None


def test_generated_tokens_are_reused_in_the_next_turn(open_lm: MakeLM, prompt: list[int]) -> None:
    lm = open_lm()
    first = lm.prefill(prompt)
    new = lm.generate(first, max_new_tokens=30, stop=[])
    assert len(new) == 30
    assert first.tokens == [*prompt, *new]
    assert lm.store(first).accepted_tokens == 96  # of 99 tokens with KV: the last one generated has none
    second = lm.prefill([*first.tokens, 5, 6, 7])
    assert second.reused_tokens == 96
    assert same_kv(second, first, 96)


def test_second_store_of_a_growing_sequence_adds_only_the_new_chunks(
    open_lm: MakeLM, prompt: list[int]
) -> None:
    lm = open_lm()
    prefill = lm.prefill(prompt)
    assert lm.store(prefill).accepted == 4
    lm.generate(prefill, max_new_tokens=30, stop=[])
    receipt = lm.store(prefill)
    assert (receipt.accepted, receipt.present) == (2, 0)
    assert lm.store(prefill).accepted == 0


def test_generating_does_not_touch_what_is_cached(
    open_lm: MakeLM, prompt: list[int], config_of: MakeConfig
) -> None:
    lm = open_lm(config_of(verify_on_hit=True))
    cold = store_all(lm, prompt)
    for _ in range(2):
        warm = lm.prefill(prompt)
        lm.generate(warm, max_new_tokens=5)
    assert lm.cache.check_integrity() == []
    assert same_kv(lm.prefill(prompt), cold)


def test_generation_goes_on_where_it_ended(open_lm: MakeLM, prompt: list[int]) -> None:
    lm = open_lm()
    at_once, in_steps = lm.prefill(prompt), lm.prefill(prompt)
    whole = lm.generate(at_once, max_new_tokens=12, stop=[])
    parts = [token for size in (1, 4, 7) for token in lm.generate(in_steps, max_new_tokens=size, stop=[])]
    assert parts == whole
    assert len(set(whole)) > 1
    assert in_steps.tokens == at_once.tokens
    assert lm.generate(in_steps, max_new_tokens=0) == []


def test_generation_is_the_models_own(open_lm: MakeLM, prompt: list[int], model_dir: Path) -> None:
    lm = open_lm(split=Split.WHOLE)
    new = lm.generate(lm.prefill(prompt), max_new_tokens=12)
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert new == output[0, len(prompt) :].tolist()


def test_stop_token_is_kept_and_ends_the_answer(open_lm: MakeLM, prompt: list[int]) -> None:
    lm = open_lm()
    script = iter([7, 9, 3, 9])
    prefill = lm.prefill(prompt)
    assert lm.generate(prefill, max_new_tokens=10, stop=[3], pick=lambda _: next(script)) == [7, 9, 3]
    assert prefill.tokens[-3:] == [7, 9, 3]


def test_the_models_own_end_token_ends_an_answer(open_lm: MakeLM, prompt: list[int]) -> None:
    lm = open_lm()
    end = int(lm.model.config.eos_token_id)
    assert lm.generate(lm.prefill(prompt), max_new_tokens=10, pick=lambda _: end) == [end]


def test_salts_do_not_share(open_lm: MakeLM, prompt: list[int]) -> None:
    lm = open_lm()
    cold = store_all(lm, prompt, salt="alice")
    other = lm.prefill(prompt, salt="bob")
    assert (other.reused_tokens, other.stopped_by) == (0, MissReason.SALT_DIFFERS)
    assert lm.prefill(prompt).reused_tokens == 0
    assert same_kv(lm.prefill(prompt, salt="alice"), cold)


def test_weights_swapped_under_the_same_path_are_another_model(
    open_lm: MakeLM, prompt: list[int], tmp_path: Path, config_of: MakeConfig, save_model: SaveModel
) -> None:
    config, path = config_of(tmp_path / "disk"), tmp_path / "model"
    save_model(path, 1)
    node = CacheNode(plan_node(config))
    try:
        cold = store_all(open_lm(config, path=path, node=node), prompt)
        save_model(path, 2)
        swapped = open_lm(config, path=path, node=node)
        miss = swapped.prefill(prompt)
        assert (miss.reused_tokens, miss.stopped_by) == (0, MissReason.NAMESPACE_CHANGED)
        assert not torch.equal(miss.logits, cold.logits)
        save_model(path, 1)
        assert same_kv(open_lm(config, path=path, node=node).prefill(prompt), cold)
    finally:
        node.close()


def test_dtypes_do_not_share(open_lm: MakeLM, prompt: list[int], config_of: MakeConfig) -> None:
    config = config_of()
    node = CacheNode(plan_node(config))
    try:
        store_all(open_lm(config, node=node), prompt)
        other = open_lm(config, node=node, dtype=torch.float16).prefill(prompt)
        assert (other.reused_tokens, other.stopped_by) == (0, MissReason.NAMESPACE_CHANGED)
    finally:
        node.close()


def test_whole_split_computes_in_one_pass_and_reuses(open_lm: MakeLM, prompt: list[int]) -> None:
    lm = open_lm(split=Split.WHOLE)
    passes = count_passes(lm)
    cold = store_all(lm, prompt)
    assert passes == [70]
    warm = lm.prefill(prompt)
    assert passes == [70, 6]
    assert same_kv(warm, cold, 64)
    assert torch.allclose(warm.logits, cold.logits, atol=1e-4)


def test_arena_that_is_too_small_only_means_less_reuse(
    open_lm: MakeLM, prompt: list[int], config_of: MakeConfig
) -> None:
    lm = open_lm(config_of(buffer_size="1Mi", eviction_threshold=0.025))  # three chunks of 8 KiB
    cold = lm.prefill(prompt)
    receipt = lm.store(cold)
    assert receipt.refusal is Refusal.NO_SLOT
    assert 0 < receipt.accepted < 4
    warm = lm.prefill(prompt)
    assert 0 < warm.reused_tokens < 64
    assert torch.equal(warm.logits, cold.logits)
    assert lm.generate(warm, max_new_tokens=5) == lm.generate(cold, max_new_tokens=5)


def test_sequence_whose_prefix_was_evicted_meanwhile_is_stored_from_the_start(
    open_lm: MakeLM, prompt: list[int]
) -> None:
    lm = open_lm()
    store_all(lm, prompt)
    prefill = lm.prefill(prompt)
    lm.cache.evict("cpu")
    lm.generate(prefill, max_new_tokens=30, stop=[])
    assert lm.store(prefill).accepted_tokens == 96
    assert lm.prefill(prefill.tokens).reused_tokens == 96


def test_damaged_record_shortens_the_reuse_and_changes_no_bit(
    open_lm: MakeLM, prompt: list[int], tmp_path: Path, config_of: MakeConfig
) -> None:
    lm = open_lm(config_of(tmp_path))
    cold = store_all(lm, prompt)
    lm.cache.evict("cpu")
    lm.cache.flush()
    flip_bit(min(record_files(tmp_path).values()), 5000)  # of whichever chunk
    warm = lm.prefill(prompt)
    assert warm.reused_tokens in {0, 16, 32, 48}
    assert warm.stopped_by is MissReason.CORRUPT
    assert torch.equal(warm.logits, cold.logits)
    assert same_kv(warm, cold)
    receipt = lm.store(warm)
    assert (receipt.accepted, receipt.refusal) == (1, None)  # healed
    assert lm.prefill(prompt).reused_tokens == 64


def test_load_that_does_not_end_is_a_miss(
    open_lm: MakeLM, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = open_lm()
    cold = store_all(lm, prompt)
    monkeypatch.setattr(lm.cache, "load", lambda *_, **__: PendingLoad(0.0))
    warm = lm.prefill(prompt)
    assert (warm.reused_tokens, warm.stopped_by) == (0, MissReason.STAGING_TIMEOUT)
    assert torch.equal(warm.logits, cold.logits)


@pytest.mark.parametrize(
    "token_ids",
    [
        torch.ones(2, 8, dtype=torch.long),
        [[1, 2], [3, 4]],
        torch.ones(1, 1, 8, 1, dtype=torch.long),
        ["a"],
        [],
    ],
    ids=["two rows", "two lists", "four dimensions", "text", "nothing"],
)
def test_batch_or_nothing_is_refused(open_lm: MakeLM, token_ids: Any) -> None:
    with pytest.raises(LayoutMismatch, match=r"one sequence at a time|at least one token"):
        open_lm().prefill(token_ids)


def test_tokenizer_output_of_one_row_is_taken(open_lm: MakeLM, prompt: list[int]) -> None:
    lm = open_lm()
    assert lm.prefill(torch.tensor([prompt])).tokens == lm.prefill(torch.tensor(prompt)).tokens == prompt


def test_batched_past_is_not_stored(open_lm: MakeLM, prompt: list[int]) -> None:
    lm = open_lm()
    prefill = lm.prefill(prompt)
    prefill.past.batch_repeat_interleave(2)
    with pytest.raises(LayoutMismatch, match="the batch has 2"):
        lm.store(prefill)


def test_cache_of_another_layout_is_refused(open_lm: MakeLM, model_dir: Path, config_of: MakeConfig) -> None:
    lm = open_lm()
    wider = lm.cache.layout.__class__(num_layers=3, num_kv_heads=2, head_dim=16, dtype="float32")
    with (
        TieredCache(config_of(), wider, Namespace.for_model(model_dir, engine="test")) as cache,
        pytest.raises(LayoutMismatch, match="layers=2"),
    ):
        CachedCausalLM(lm.model, cache)


def test_closed_cache_raises(model_dir: Path, prompt: list[int], config_of: MakeConfig) -> None:
    with CachedCausalLM.from_pretrained(model_dir, config_of()) as lm:
        prefill = lm.prefill(prompt)
    with pytest.raises(CacheClosed):
        lm.prefill(prompt)
    with pytest.raises(CacheClosed):
        lm.store(prefill)


def test_model_of_ones_own_takes_five_lines(model_dir: Path, prompt: list[int]) -> None:
    from kvtiers import CacheConfig, TieredCache
    from kvtiers.integrations.transformers import layout_of, namespace_of

    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = CacheConfig.from_mapping({"storage": {"chunk_tokens": 16, "cpu": {"buffer_size": "16Mi"}}})
    with TieredCache(config, layout_of(model), namespace_of(model, model_dir)) as cache:
        lm = CachedCausalLM(model, cache)
        for reused in (0, 64):
            prefill = lm.prefill(prompt)
            assert prefill.reused_tokens == reused
            lm.generate(prefill, max_new_tokens=3)
            lm.store(prefill)
