"""`kvtiers demo`: the main job on a real model, which checks itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtiers.cli.output import JSON_OPTION, console, note, print_json
from kvtiers.cli.own_network import again_in_own_network

if TYPE_CHECKING:
    from kvtiers.ops.demo.outcome import Outcome

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    ctx: typer.Context,
    *,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A causal language model on disk. Without it: SmolLM2-135M-Instruct, which comes with the demo.",
        ),
    ] = None,
    document: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A text to ask about, UTF-8. Without it: a handbook of 2,000 tokens."
        ),
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A question about the document; may be repeated.")
    ] = None,
    turns: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            max=1000,
            help="Hold a conversation of N turns instead: time to first token per turn, with and without cache.",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where the JSON file and the plot go; made if it is not there."),
    ] = Path("demo-output"),
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="YAML configuration; what it does not say is sized for the prompt."
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=65536,
            help="Tokens of a chunk; 256 if the configuration has no other number.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, max=100_000, help="Longest answer, in tokens.")
    ] = 40,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=1024, help="Threads that compute; all cores if not given."),
    ] = None,
    remote: Annotated[
        str | None,
        typer.Option(
            metavar="STORE",
            help="A second instance loads the document's KV from a remote store that the first one wrote to: redis, mooncake, s3 or fs.",
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="With --remote: a store that runs already. Without it the demo starts one on the loopback, and ends it.",
        ),
    ] = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """A model answers questions about a document: without cache, then with its KV from GPU, CPU memory and disk, then after a restart, and by a second instance that shares nothing but a remote store.

    It checks itself: KV loaded is bit-identical to what was stored, it came
    from the tier named, and the answers are those without cache.

    Exit code 1 if that does not hold. The GPU tier is simulated where there
    is no GPU, and says so.
    """
    from kvtiers.ops.demo.options import DemoOptions, read_material
    from kvtiers.ops.demo.run import run_demo
    from kvtiers.ops.demo.tables import failures, render
    from kvtiers.ops.engines import wants_own_network

    options = DemoOptions(
        model=model,
        document=document,
        questions=tuple(question or ()),
        turns=turns,
        output=output,
        config=config,
        chunk_tokens=chunk_tokens,
        max_new_tokens=max_new_tokens,
        threads=threads,
        remote=remote,
        endpoint=endpoint,
    )
    if remote is not None and endpoint is None and wants_own_network(remote):
        read_material(options)
        again_in_own_network(ctx)
    outcome = run_demo(options, note)
    written = _write(outcome, output)
    if as_json:
        print_json(outcome.as_json())
    else:
        console().print(render(outcome))
        typer.echo(f"\nWritten: {', '.join(map(str, written))}")
    if not outcome.passed:
        note("error: the demo's checks failed:")
        for line in failures(outcome.checks):
            note(f"  - {line}")
        raise typer.Exit(1)


def _write(outcome: Outcome, output: Path) -> list[Path]:
    import json

    from kvtiers.ops.demo.plot import draw

    name = "conversation" if outcome.conversation else "demo"
    report, picture = output / f"{name}.json", output / f"{name}.png"
    report.write_text(json.dumps(outcome.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        draw(outcome, picture)
    except ImportError:
        note("no plot: matplotlib isn't installed (pip install 'kvtiers[plot]')")
        return [report]
    return [report, picture]
