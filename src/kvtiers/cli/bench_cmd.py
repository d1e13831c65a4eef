"""`kvtiers bench tiers|lookup|restart|overhead|remote|all`: the machine's limit, us, and a peer, measured in turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvtiers.cli.output import JSON_OPTION, console, note, print_json, progress

if TYPE_CHECKING:
    from kvtiers.ops.bench.report import Report

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="How near the machine's limits the cache is: the limit, the cache, and a peer where one is given, in turns in one run.",
)

_ALL: Final = "all"
_NO_PEER: Final = "none"

ROUNDS = Annotated[
    int, typer.Option(metavar="N", min=1, max=1000, help="Rounds; each has every contestant once.")
]
SHAPE = Annotated[
    str, typer.Option(metavar="NAME", help="Whose KV: llama3-8b, smollm2-135m, or both of them.")
]
DIRECTORY = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="On the disk to be measured. Files are written below it, and removed at the end."
    ),
]
OUTPUT = Annotated[
    Path, typer.Option(metavar="DIR", help="Where the JSON file and the plot go; made if it is not there.")
]
PEER = Annotated[
    str | None,
    typer.Option(
        metavar="PYTHON",
        help="Another cache in the same rounds: the Python of the virtualenv with LMCache, or a whole command line; none for none. "
        "Without it, the one that `make bench-peer-venv` has made, if it has.",
    ),
]
TINY = Annotated[
    bool, typer.Option("--tiny", hidden=True, help="Everything, at a size that measures nothing.")
]


@app.command()
def tiers(
    *,
    rounds: ROUNDS = 9,
    shape: SHAPE = "both",
    directory: DIRECTORY = Path("bench-output"),
    output: OUTPUT = Path("bench-output"),
    peer: PEER = None,
    tiny: TINY = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """CPU memory and disk: loads and stores against raw copies, reads and writes; latencies of a chunk's load."""
    _bench(
        "tiers",
        ["tiers"],
        rounds=rounds,
        shape=shape,
        directory=directory,
        output=output,
        peer=peer,
        tiny=tiny,
        as_json=as_json,
    )


@app.command()
def lookup(
    *,
    rounds: ROUNDS = 9,
    output: OUTPUT = Path("bench-output"),
    peer: PEER = None,
    tiny: TINY = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """128k tokens that hit everywhere, and that miss, against hashing them."""
    _bench(
        "lookup",
        ["lookup"],
        rounds=rounds,
        directory=output,
        output=output,
        peer=peer,
        tiny=tiny,
        as_json=as_json,
    )


@app.command()
def restart(
    *,
    rounds: ROUNDS = 9,
    directory: DIRECTORY = Path("bench-output"),
    output: OUTPUT = Path("bench-output"),
    tiny: TINY = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """A new process on a directory of 100,000 chunks: to its first hit, with the index log and without."""
    _bench(
        "restart", ["restart"], rounds=rounds, directory=directory, output=output, tiny=tiny, as_json=as_json
    )


@app.command()
def overhead(
    *,
    rounds: ROUNDS = 9,
    shape: SHAPE = "both",
    directory: DIRECTORY = Path("bench-output"),
    output: OUTPUT = Path("bench-output"),
    tiny: TINY = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """The engine's thread: stores beside a disk that hangs, Python work per chunk, waits for locks."""
    _bench(
        "overhead",
        ["overhead"],
        rounds=rounds,
        shape=shape,
        directory=directory,
        output=output,
        tiny=tiny,
        as_json=as_json,
    )


@app.command()
def remote(
    *,
    rounds: ROUNDS = 9,
    shape: SHAPE = "both",
    directory: DIRECTORY = Path("bench-output"),
    output: OUTPUT = Path("bench-output"),
    peer: PEER = None,
    tiny: TINY = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Remote stores, those whose server is installed, started on the loopback: Valkey, Mooncake, S3."""
    _bench(
        "remote",
        ["remote"],
        rounds=rounds,
        shape=shape,
        directory=directory,
        output=output,
        peer=peer,
        tiny=tiny,
        as_json=as_json,
    )


@app.command(name=_ALL)
def everything(
    *,
    rounds: ROUNDS = 9,
    shape: SHAPE = "both",
    directory: DIRECTORY = Path("bench-output"),
    output: OUTPUT = Path("bench-output"),
    peer: PEER = None,
    tiny: TINY = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """All of them: bench.json, bench.png, and bench.md for a document."""
    from kvtiers.ops.bench.run import SUBJECTS

    _bench(
        _ALL,
        SUBJECTS,
        rounds=rounds,
        shape=shape,
        directory=directory,
        output=output,
        peer=peer,
        tiny=tiny,
        as_json=as_json,
    )


def _bench(
    command: str,
    subjects: Sequence[str],
    *,
    rounds: int,
    output: Path,
    directory: Path,
    tiny: bool,
    as_json: bool,
    shape: str = "both",
    peer: str | None = None,
) -> None:
    from kvtiers.ops.bench.peer import installed_peer
    from kvtiers.ops.bench.run import run_bench
    from kvtiers.ops.bench.settings import BenchSettings, make_output
    from kvtiers.ops.bench.shapes import TINY as TINY_SHAPE
    from kvtiers.ops.bench.shapes import shapes_named
    from kvtiers.ops.bench.tables import render

    chosen = None if peer == _NO_PEER else peer or installed_peer()
    settings = BenchSettings(shapes_named(TINY_SHAPE if tiny else shape), rounds, directory, chosen)
    make_output(output)
    with progress("measuring") as advance:
        report = run_bench(settings, subjects, command=command, advance=lambda: advance(1), say=note)
    written = _write(report, output)
    if as_json:
        print_json(report.as_json())
    else:
        console().print(render(report))
        typer.echo(f"\nWritten: {', '.join(map(str, written))}")


def _write(report: Report, output: Path) -> list[Path]:
    from kvtiers.ops.bench.plot import draw
    from kvtiers.ops.bench.tables import markdown

    name = "bench" if report.command == _ALL else f"bench-{report.command}"
    document, picture, fragment = (output / f"{name}.{suffix}" for suffix in ("json", "png", "md"))
    document.write_text(json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    fragment.write_text(markdown(report), encoding="utf-8")
    written = [document, fragment]
    try:
        if draw(report, picture):
            written.append(picture)
    except ImportError:
        note("no plot: matplotlib isn't installed (pip install 'kvtiers[plot]')")
    return written
