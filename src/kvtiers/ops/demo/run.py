"""The demo from options to outcome. Runs on the caller's thread; leaves what is in the output directory and nothing else.

What the reader can change is refused before anything is measured.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kvtiers.config import CacheConfig, fit
from kvtiers.model.layout import KVLayout, round_to_page
from kvtiers.model.tiers import Tier
from kvtiers.ops.demo.checks import Expected, judge
from kvtiers.ops.demo.document import Document, Message, Question
from kvtiers.ops.demo.facts import facts
from kvtiers.ops.demo.measure import Source
from kvtiers.ops.demo.model import MODEL_NAME, obtain_model
from kvtiers.ops.demo.options import BadOption, DemoOptions, default_threads, read_material, turns_of
from kvtiers.ops.demo.outcome import PAGE_CACHE, Outcome, Setup
from kvtiers.ops.demo.questions import answer_from_every_tier, sources_of
from kvtiers.ops.demo.remote import check_remote, engine_for, given_engine, remote_text, with_engine
from kvtiers.ops.demo.restart import Restarted, answer_in_new_process
from kvtiers.ops.demo.session import (
    Say,
    Work,
    device,
    load_chat,
    load_model,
    open_session,
    prepare_libraries,
)
from kvtiers.ops.demo.settings import demo_settings, explicit_settings, second_instance, tiers_to_show
from kvtiers.ops.demo.turns import converse
from kvtiers.ops.engines import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvtiers.ops.demo.chat import Chat


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be done, when all of it is known to be possible."""

    setup: Setup
    work: Work
    chat: Chat
    document: Document
    lines: tuple[str, ...]
    """What is said in the conversation; empty for the table."""
    context: int | None
    """Tokens the model takes, if it says so."""
    scratch: Path
    say: Say


def run_demo(options: DemoOptions, say: Say) -> Outcome:
    """Do all of it. Raises BadOption, DoesNotFit and other ConfigErrors; DemoModelError, RestartFailed, EngineUnavailable."""
    document = read_material(options)
    said = explicit_settings(_config_of(options.config))
    check_remote(with_engine(said, given_engine(options)))
    threads = options.threads or default_threads()
    say(f"importing torch and transformers, {threads} thread{'s' if threads != 1 else ''}")
    prepare_libraries(threads)
    path = options.model or obtain_model(say)
    chat = load_chat(path)
    say(f"loading {MODEL_NAME if options.model is None else path} in fp32")
    model = load_model(path, device())
    options.output.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(prefix=".kvtiers-demo-", dir=options.output) as scratch,
        engine_for(options, Path(scratch), say) as engine,
    ):
        job = _plan(
            options,
            document,
            said,
            engine,
            model=model,
            chat=chat,
            path=path,
            scratch=Path(scratch),
            say=say,
        )
        return _converse(job, model) if job.lines else _answer(job, model)


def _answer(job: _Job, model: PreTrainedModel) -> Outcome:
    from kvtiers.ops.demo.stored import StoredKV

    setup, work = job.setup, job.work
    stored = StoredKV(setup.chunk_tokens)
    session = open_session(model, job.chat, work, job.say)
    with session.lm:
        answered = answer_from_every_tier(session, stored)
    runs, integrity = answered.runs, [("first process", answered.integrity)]
    restart: dict[str, Any] = {}
    second: dict[str, Any] = {}
    notes: list[str] = []
    if Tier.DISK in setup.tiers:
        job.say("restart: the cache is closed, a new process opens it")
        restarted = answer_in_new_process(work, job.scratch)
        runs += restarted.runs
        integrity.append(("restart", restarted.integrity))
        restart = {**_beginning(restarted), "disk_read_past_page_cache": restarted.past_page_cache}
        if not restarted.past_page_cache:
            notes.append(PAGE_CACHE)
    if Tier.REMOTE in setup.tiers:
        job.say("second instance: a new process that has nothing but the remote store")
        instance = answer_in_new_process(_of_second_instance(work), job.scratch)
        runs += instance.runs
        integrity.append(("second instance", instance.integrity))
        second = _beginning(instance)
    numbers = range(len(work.prompts))
    checks = judge(
        runs,
        planned=[(number, source) for number in numbers for source in sources_of(setup.tiers)],
        expected={
            number: Expected(stored.reusable(prompt), stored.known(prompt))
            for number, prompt in enumerate(work.prompts)
        },
        integrity=integrity,
        refusals=[] if answered.refusal is None else [answered.refusal],
        chunk_tokens=setup.chunk_tokens,
    )
    return Outcome(
        setup=setup,
        questions=job.document.questions,
        runs=runs,
        checks=tuple(checks),
        conversation=False,
        restart=restart,
        second_instance=second,
        stats=answered.stats,
        notes=tuple(notes),
    )


def _beginning(process: Restarted) -> dict[str, Any]:
    return {"load_model_s": process.load_model_s, "open_cache_s": process.open_cache_s}


def _of_second_instance(work: Work) -> Work:
    own = tuple(tier for tier in work.tiers if tier is not Tier.DISK)
    return replace(work, settings=second_instance(work.settings), tiers=(*own, Tier.REMOTE))


def _converse(job: _Job, model: PreTrainedModel) -> Outcome:
    from kvtiers.ops.demo.stored import StoredKV

    chunk_tokens = job.setup.chunk_tokens
    session = open_session(model, job.chat, job.work, job.say)
    with session.lm:
        talk = converse(session, job.document, job.lines, StoredKV(chunk_tokens), context=job.context)
    turns = range(len(talk.said))
    checks = judge(
        talk.runs,
        planned=[(turn, source) for turn in turns for source in (Source.NO_CACHE, Source.CACHE)],
        expected={turn: Expected(talk.expected_tokens[turn], talk.expected_rows[turn]) for turn in turns},
        integrity=[("the process", talk.integrity)],
        refusals=talk.refusals,
        chunk_tokens=chunk_tokens,
    )
    return Outcome(
        setup=job.setup,
        questions=tuple(Question(line) for line in talk.said),
        runs=talk.runs,
        checks=tuple(checks),
        conversation=True,
        restart={},
        second_instance={},
        stats=talk.stats,
        notes=(f"The conversation ended early: {talk.ended_early}.",) if talk.ended_early else (),
    )


# --- planning ------------------------------------------------------------------------------------------------------------


def _plan(
    options: DemoOptions,
    document: Document,
    said: dict[str, Any],
    engine: Engine | None,
    *,
    model: PreTrainedModel,
    chat: Chat,
    path: Path,
    scratch: Path,
    say: Say,
) -> _Job:
    """Prompts and tiers, checked against the model and the machine."""
    lines = turns_of(options, document)
    asked = lines[:1] if lines else [question.text for question in document.questions]
    prompts = [chat.prompt(document.messages(text)) for text in asked]
    chunk_tokens = options.chunk_tokens or CacheConfig.from_mapping(said, environ={}).storage.chunk_tokens
    context = _context_of(model)
    _check_prompts(options, prompts, chunk_tokens, context)
    longest = max(map(len, prompts)) + options.max_new_tokens
    for line in lines[1:]:
        longest += len(chat.prompt([Message(role="user", content=line)])) + options.max_new_tokens
    layout = _layout_of(options, model)
    chunks = -(-min(longest, context or longest) // chunk_tokens)
    kv_bytes = chunks * round_to_page(layout.nbytes(chunk_tokens))
    settings = demo_settings(
        with_engine(said, engine),
        kv_bytes=kv_bytes,
        chunk_tokens=chunk_tokens,
        device=device(),
        disk_path=scratch / "cache",
    )
    config = CacheConfig.from_mapping(settings, environ={})
    tiers = tiers_to_show(config, kv_bytes)
    threads = options.threads or default_threads()
    work = Work(
        model=str(path),
        settings=settings,
        device=device(),
        threads=threads,
        prompts=tuple(map(tuple, prompts)),
        tiers=tuple(tier for tier in tiers if tier is not Tier.REMOTE),
        max_new_tokens=options.max_new_tokens,
        salt=secrets.token_hex(8),
    )
    setup = _setup_of(options, config, layout, work, tiers=tiers, remote=remote_text(config, engine))
    return _Job(setup, work, chat, document, tuple(lines), context, scratch, say)


def _setup_of(
    options: DemoOptions,
    config: CacheConfig,
    layout: KVLayout,
    work: Work,
    *,
    tiers: tuple[Tier, ...],
    remote: str,
) -> Setup:
    fitted = fit(config)
    sizes = {Tier.GPU: fitted.gpu_bytes, Tier.CPU: fitted.cpu_bytes, Tier.DISK: fitted.disk_bytes}
    return Setup(
        model=MODEL_NAME if options.model is None else str(options.model),
        document="the handbook of the Skerry Sound Ferry Service, written for this demo"
        if options.document is None
        else str(options.document),
        layout=layout,
        device=work.device,
        threads=work.threads,
        chunk_tokens=config.storage.chunk_tokens,
        max_new_tokens=work.max_new_tokens,
        tiers=tiers,
        tier_bytes={tier.value: sizes[tier] for tier in work.tiers},
        simulated_gpu=Tier.GPU in work.tiers and config.storage.gpu.device == "cpu",
        compression=config.storage.disk.compression,
        remote=remote,
        facts=facts(),
    )


def _config_of(file: Path | None) -> CacheConfig:
    """What the reader wrote. Fitted at once: what is too large for this machine needs no model to be refused."""
    config = CacheConfig.from_mapping({}) if file is None else CacheConfig.from_yaml(file)
    fit(config)
    return config


def _context_of(model: PreTrainedModel) -> int | None:
    config: Any = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def _layout_of(options: DemoOptions, model: PreTrainedModel) -> KVLayout:
    from kvtiers.integrations.transformers import UnsupportedModel, layout_of

    try:
        return layout_of(model)
    except UnsupportedModel as error:
        raise BadOption([f"--model {options.model}: {error}"]) from error


def _check_prompts(
    options: DemoOptions, prompts: Sequence[Sequence[int]], chunk_tokens: int, context: int | None
) -> None:
    what = "the document" if options.document is None else f"--document {options.document}"
    problems = []
    common = min(_common_prefix(prompts[0], prompt) for prompt in prompts)
    if common < chunk_tokens:
        problems.append(
            f"{what}: all prompts begin with the same {common} tokens, and a chunk has {chunk_tokens}, so nothing could be "
            f"reused; take a longer text, or --chunk-tokens {max(1, common // 4)}"
        )
    longest = max(map(len, prompts)) + options.max_new_tokens
    if context is not None and longest > context:
        problems.append(
            f"{what}: with a question and an answer it has {longest:,} tokens, and the model takes {context:,}; "
            "take a shorter text, or another model"
        )
    if problems:
        raise BadOption(problems)


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
