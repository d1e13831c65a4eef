"""`kvtiers evict TIER`: make room in a running service now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtiers.cli.output import JSON_OPTION, print_json
from kvtiers.cli.running_service import SOCKET_OPTION, TOKEN_OPTION, URL_OPTION, RunningService

app = typer.Typer(add_completion=False)


@app.command()
def evict(
    tier: Annotated[
        str, typer.Argument(metavar="TIER", help="cpu, disk or remote; the GPU's memory is the engines'.")
    ],
    *,
    target_usage: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0, max=1, help="Evict down to this share of the tier's capacity."),
    ],
    url: Annotated[str | None, URL_OPTION] = None,
    socket: Annotated[Path | None, SOCKET_OPTION] = None,
    token_file: Annotated[Path | None, TOKEN_OPTION] = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Evict from a tier down to a share of its capacity: --target-usage 0.7. What no slower tier has is written there first."""
    from kvtiers.config.sizes import format_size

    with RunningService.reach(url, socket, token_file) as service:
        done = service.post("/api/v1/cache/evict", {"tier": tier, "target_usage": target_usage})
    if as_json:
        print_json(done)
        return
    later = (
        f"; {done['demoting_chunks']} more go when the next tier has them" if done["demoting_chunks"] else ""
    )
    typer.echo(
        f"{tier}: {done['evicted_chunks']} chunks evicted, {format_size(done['evicted_bytes'])}{later}; "
        f"{done['usage_percent']:.1f} % in use"
    )
