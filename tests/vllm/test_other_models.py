"""Tensor parallel, adapters, a service of the engine's own, MLA and sliding windows, on small random models whose tokens depend on all of the prompt."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from kvtiers.testing.disk_damage import damage_file, record_files
from kvtiers.testing.sealed_parts import Damage
from kvtiers.testing.service_process import ServiceProcess

if TYPE_CHECKING:
    from tests.vllm.conftest import Engine, MakeEngine

pytestmark = pytest.mark.vllm

SMALL: dict[str, Any] = {"skip_tokenizer_init": True}
LATENT: dict[str, Any] = {
    **SMALL,
    "group": "mla",
    "block_size": 16,
    "num_gpu_blocks_override": 48,
    "attention_backend": "CPU_MLA",
}
"""vLLM's MLA for any CPU: it takes blocks of 16 only, and turns prefix caching off. On one with AMX vLLM would choose another, which has no float32."""
MakeModel: TypeAlias = Callable[[str], Path]
Connector: TypeAlias = Callable[..., dict[str, Any]]


def prompt(seed: int, length: int = 300) -> list[int]:
    return [random.Random(seed + index * 1000).randrange(2, 512) for index in range(length)]


@pytest.fixture(scope="session")
def make_model(vllm_python: Path, folder: Path) -> MakeModel:
    def make(kind: str) -> Path:
        target = folder / f"model-{kind}"
        if not target.exists():
            script = Path(__file__).with_name("make_model.py")
            subprocess.run([vllm_python, script, kind, target], check=True, capture_output=True)
        return target

    return make


@pytest.fixture(scope="session")
def make_adapter(vllm_python: Path, folder: Path) -> Callable[[str, int], Path]:
    def make(name: str, seed: int) -> Path:
        target = folder / f"adapter-{name}"
        script = Path(__file__).with_name("make_model.py")
        subprocess.run([vllm_python, script, "adapter", target, str(seed)], check=True, capture_output=True)
        return target

    return make


def expected_answers(engine: Engine, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    answers = [engine.generate(one)[0].tokens for one in prompts]
    engine.stop()
    assert len(set(answers)) == len(answers)  # else they would prove nothing
    return answers


def hit_of(engine: Engine, one: list[int], wanted: Any, cached: int) -> Any:
    """The answer to what the engine itself has forgotten, with so many tokens from the cache."""
    assert engine.reset()
    answer = engine.generate(one)[0]
    assert (answer.tokens, answer.cached) == (wanted, cached)
    return answer


def test_ranks_of_a_tensor_parallel_engine_each_get_their_part_and_damage_to_one_ends_the_hit(
    make_engine: MakeEngine,
    make_model: MakeModel,
    make_session_service: Callable[[str], ServiceProcess],
    connector: Connector,
    reconnect_to: Callable[..., None],
) -> None:
    model = make_model("llama")
    options = {**SMALL, "tensor_parallel_size": 2, "group": "tp"}
    prompts = [prompt(1), prompt(2)]
    expected = expected_answers(make_engine(model, enable_prefix_caching=False, **options), prompts)
    service = make_session_service("t")
    engine = make_engine(model, kv_transfer_config=connector(service.socket), **options)
    for one, wanted in zip(prompts, expected, strict=True):
        cold = engine.generate(one)[0]
        assert (cold.cached, cold.tokens) == (0, wanted)
        assert engine.stored(cold) == list(range(8))
        hit = hit_of(engine, one, wanted, 256)
        assert engine.loaded(hit.name, ranks=2) == list(range(8))

    keys = engine.hashes(engine.generate(prompts[1])[0])
    before = service.log.count("is connected")
    assert service.terminate() == 0
    parts = {(ref.key.hex(), ref.part): file for ref, file in record_files(service.disk).items()}
    assert (keys[5], 0) in parts
    damage_file(parts[keys[5], 1], Damage.FLIP_PAYLOAD)
    service.start()
    reconnect_to(service, engine, before, ranks=2)
    sound = hit_of(engine, prompts[0], expected[0], 256)
    assert engine.loaded(sound.name, ranks=2) == list(range(8))
    damaged = hit_of(engine, prompts[1], expected[1], 128)
    assert engine.loaded(damaged.name, ranks=2) == list(range(4))
    mended = hit_of(engine, prompts[1], expected[1], 256)
    assert engine.loaded(mended.name, ranks=2) == list(range(8))
    engine.stop()


def test_engine_without_a_service_starts_its_own_and_the_next_one_finds_what_is_on_disk(
    make_engine: MakeEngine, make_model: MakeModel, connector: Connector, folder: Path
) -> None:
    model, prompts, options = make_model("llama"), [prompt(3), prompt(4)], {**SMALL, "group": "own"}
    expected = expected_answers(make_engine(model, enable_prefix_caching=False, **options), prompts)
    disk = {"enabled": True, "path": str(folder / "own-disk"), "max_size": "1Gi", "min_free_space": 0}
    storage = {"chunk_tokens": 64, "cpu": {"buffer_size": "64Mi"}, "disk": disk}
    config = {"storage": storage, "async": {"load_timeout_ms": 20_000}}
    for round_ in range(2):
        engine = make_engine(model, kv_transfer_config=connector(config=config), **options)
        for one, wanted in zip(prompts, expected, strict=True):
            first = engine.generate(one)[0]
            assert (first.cached, first.tokens) == (256 * round_, wanted)
            assert engine.loaded(first.name) == list(range(8 * round_))
            assert engine.reset()
            hit = engine.generate(one)[0]
            assert (hit.cached, hit.tokens) == (256, wanted)
            assert engine.loaded(hit.name) == list(range(8))
        engine.stop()


def test_adapters_have_prompts_of_their_own_also_when_one_is_trained_anew(
    make_engine: MakeEngine,
    make_model: MakeModel,
    make_adapter: Callable[[str, int], Path],
    connector: Connector,
    service: ServiceProcess,
) -> None:
    model, one = make_model("llama"), prompt(9)
    adapters = [None] + [
        {"number": number, "path": str(make_adapter(name, number))} for number, name in ((1, "a"), (2, "b"))
    ]
    options = {**SMALL, "group": "lora", "enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    plain = make_engine(model, enable_prefix_caching=False, **options)
    expected = [plain.generate(one, adapter=adapter)[0].tokens for adapter in adapters]
    engine = make_engine(model, kv_transfer_config=connector(service.socket), **options)
    for cached in (0, 256):
        for adapter, wanted in zip(adapters, expected, strict=True):
            answer = engine.generate(one, adapter=adapter)[0]
            assert (answer.cached, answer.tokens) == (cached, wanted)
            assert engine.loaded(answer.name) == list(range(cached // 32))
            assert engine.reset()

    anew = {"number": 3, "path": str(make_adapter("a", 3))}
    expected.append(plain.generate(one, adapter=anew)[0].tokens)
    plain.stop()
    assert len(set(expected)) == 4  # else they would prove nothing
    for cached in (0, 256):  # vLLM's hashes are those of the one before
        answer = engine.generate(one, adapter=anew)[0]
        assert (answer.cached, answer.tokens) == (cached, expected[3])
        assert engine.loaded(answer.name) == list(range(cached // 32))
        assert engine.reset()
    engine.stop()


def test_latent_attention_is_right_where_vllm_has_no_prefix_cache_for_it(
    make_engine: MakeEngine, make_model: MakeModel, connector: Connector, service: ServiceProcess
) -> None:
    model, prompts = make_model("latent"), [prompt(5), prompt(6)]
    expected = expected_answers(make_engine(model, **LATENT), prompts)
    engine = make_engine(model, kv_transfer_config=connector(service.socket), **LATENT)
    assert "kvtiers caches nothing for this engine: prefix caching is off" in engine.log
    for one, wanted in zip(prompts, expected, strict=True):
        for _ in range(2):
            answer = engine.generate(one)[0]
            assert (answer.cached, answer.tokens) == (0, wanted)
            assert engine.loaded(answer.name) == []
    engine.stop()


def test_sliding_windows_are_right_without_the_cache_and_cached_as_full_attention(
    make_engine: MakeEngine,
    make_model: MakeModel,
    connector: Connector,
    folder: Path,
    service: ServiceProcess,
) -> None:
    model, prompts = make_model("windows"), [prompt(7), prompt(8)]
    expected = expected_answers(
        make_engine(model, enable_prefix_caching=False, group="windows", **SMALL), prompts
    )
    options = {**SMALL, "group": "windows", "kv_transfer_config": connector(service.socket)}
    hybrid = make_engine(model, disable_hybrid_kv_cache_manager=False, **options)
    assert "kvtiers caches nothing for this engine: the model has 2 kinds of KV cache" in hybrid.log
    for one, wanted in zip(prompts, expected, strict=True):
        for _ in range(2):
            answer = hybrid.generate(one)[0]
            assert (answer.cached, answer.tokens) == (0, wanted)
            assert hybrid.loaded(answer.name) == []
            assert hybrid.reset()
    hybrid.stop()
    uniform = make_engine(model, disable_hybrid_kv_cache_manager=True, **options)
    for one, wanted in zip(prompts, expected, strict=True):
        cold = uniform.generate(one)[0]
        assert (cold.cached, cold.tokens) == (0, wanted)
        assert uniform.reset()
        hit = uniform.generate(one)[0]
        assert (hit.cached, hit.tokens) == (256, wanted)
        assert uniform.loaded(hit.name) == list(range(8))
    uniform.stop()
