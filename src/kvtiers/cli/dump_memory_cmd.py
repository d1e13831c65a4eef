"""`kvtiers dump-memory`: what lies in a running service's memory, and whose it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtiers.cli.output import note, print_json
from kvtiers.cli.running_service import SOCKET_OPTION, TOKEN_OPTION, URL_OPTION, RunningService
from kvtiers.model.errors import ConfigError

app = typer.Typer(add_completion=False)


@app.command("dump-memory")
def dump_memory(
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default, and -: to stdout.", dir_okay=False),
    ] = None,
    url: Annotated[str | None, URL_OPTION] = None,
    socket: Annotated[Path | None, SOCKET_OPTION] = None,
    token_file: Annotated[Path | None, TOKEN_OPTION] = None,
) -> None:
    """Write a JSON map of the service's memory: every slot with its chunk, state, leases, owners and age; bytes by tier and namespace."""
    with RunningService.reach(url, socket, token_file) as service:
        found = service.get("/api/v1/memory")
    if output is None or str(output) == "-":
        print_json(found)
        return
    _write(output, found)
    note(f"wrote {output}: {_summary(found)}")


def _write(output: Path, found: dict[str, Any]) -> None:
    """Whole or not at all; but what is no file (`/dev/stdout`, a pipe) is written to, not replaced."""
    text = json.dumps(found, indent=1) + "\n"
    target = output.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if output.exists() and not output.is_file():
            output.write_text(text, encoding="utf-8")
        else:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError([f"--output {output}: {error.strerror}"]) from None


def _summary(found: dict[str, Any]) -> str:
    from kvtiers.config.sizes import format_size

    taken = sum(slot["nbytes"] for slot in found["slots"])
    leased = sum(1 for slot in found["slots"] if slot["leases"])
    return (
        f"{len(found['slots'])} slots in use ({leased} leased), {format_size(taken)} of {format_size(found['arena']['nbytes'])}, "
        f"{len(found['namespaces'])} namespaces, {len(found['clients'])} engines"
    )
