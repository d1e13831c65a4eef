"""One vLLM engine, driven by lines of JSON: `engine_child.py OPTIONS`, run by the Python that has vLLM.

Each command has a number, and is answered with it: `{"call": 3, "do": "generate", …}`. The engine's own output goes to stderr.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any


async def generate(engine: Any, command: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    prompt = TokensPrompt(prompt_token_ids=command["prompt"])
    if command.get("salt"):
        prompt["cache_salt"] = command["salt"]
    params = SamplingParams(
        max_tokens=command["max_tokens"],
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"kv_transfer_params": command["wishes"]} if command.get("wishes") else None,
    )
    adapter = command.get("adapter")
    lora = LoRARequest("adapter", adapter["number"], adapter["path"]) if adapter else None
    last = None
    async for output in engine.generate(prompt, params, command["name"], lora_request=lora):
        last = output
    if last is None or not last.finished or last.outputs[0].finish_reason != "length":
        return {"aborted": True}
    return {"tokens": list(last.outputs[0].token_ids), "cached": last.num_cached_tokens}


async def carry_out(engine: Any, command: dict[str, Any]) -> dict[str, Any]:
    match command["do"]:
        case "generate":
            return await generate(engine, command)
        case "abort":
            await engine.abort(command["name"])
            return {}
        case "reset":
            return {"reset": await engine.reset_prefix_cache(reset_connector=command["connector"])}
        case "tokens":
            return {"tokens": engine.get_tokenizer().encode(command["text"])}
        case "metrics":
            from vllm.v1.metrics.reader import get_metrics_snapshot

            found = ((metric.name, getattr(metric, "value", None)) for metric in get_metrics_snapshot())
            return {"metrics": {name: value for name, value in found if value is not None}}
        case _:
            raise ValueError(command)


async def serve(options: dict[str, Any], say: Any) -> None:
    from vllm import AsyncEngineArgs
    from vllm.config import KVTransferConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    if "kv_transfer_config" in options:
        options["kv_transfer_config"] = KVTransferConfig(**options["kv_transfer_config"])
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
    running: set[asyncio.Task[None]] = set()

    async def answer(command: dict[str, Any]) -> None:
        try:
            found = await carry_out(engine, command)
        except Exception as error:  # noqa: BLE001 - the test says what it thinks of it
            found = {"error": repr(error)}
        say({"call": command["call"], **found})

    say({"call": 0})
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        task = asyncio.create_task(answer(json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    engine.shutdown()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(what: dict[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    asyncio.run(serve(json.loads(sys.argv[1]), say))


if __name__ == "__main__":  # vLLM spawns
    main()
