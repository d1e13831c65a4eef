"""What makes two engines' chunks different ones."""

from __future__ import annotations

from kvtiers.testing.paged_blocks import paged_plan


def test_engines_with_other_attention_backends_share_nothing() -> None:
    plan = paged_plan(8)
    names = ("FLASH_ATTN", "FLASHINFER", "FLASH_ATTN,TRITON_ATTN")
    assert len({plan.with_backend(name).namespace.digest for name in names}) == 3
    assert plan.with_backend("FLASHINFER") == plan.with_backend("FLASHINFER")


def test_reset_keeps_all_else_of_the_namespace() -> None:
    plan = paged_plan(8).with_backend("FLASHINFER")
    assert plan.with_epoch(7).namespace.attention_backend == "FLASHINFER"
    assert plan.with_epoch(7).namespace.digest != plan.namespace.digest
