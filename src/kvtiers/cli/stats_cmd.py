"""`kvtiers stats`: the counters of a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvtiers.cli.output import JSON_OPTION, print_json, print_table
from kvtiers.cli.running_service import SOCKET_OPTION, TOKEN_OPTION, URL_OPTION, RunningService

app = typer.Typer(add_completion=False)


@app.command()
def stats(
    *,
    url: Annotated[str | None, URL_OPTION] = None,
    socket: Annotated[Path | None, SOCKET_OPTION] = None,
    token_file: Annotated[Path | None, TOKEN_OPTION] = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Show a running service's tiers, hits, misses and background work, counted since it started.

    A request consults the tiers in turn, nearest first: lookups of a tier are the chunks it was asked for, hits those it had.
    """
    with RunningService.reach(url, socket, token_file) as service:
        found = service.get("/api/v1/cache/stats")
    if as_json:
        print_json(found)
        return
    print_tiers(found["tiers"])
    _print_counts("why requests stopped short", found["misses"])
    _print_counts("why chunks were not taken", found["refusals"])
    work = found["async"]
    typer.echo(
        f"\nbackground work: {work['queue_size']} waiting, {work['pending_tasks'] - work['queue_size']} running"
    )


def print_tiers(tiers: dict[str, dict[str, Any]]) -> None:
    """A line for each tier."""
    from kvtiers.config.sizes import format_size

    def size(tier: dict[str, Any], name: str) -> str:
        return format_size(tier[name]) if tier.get(name) is not None else "-"

    def rate(tier: dict[str, Any]) -> str:
        return f"{100 * tier['hits'] / tier['lookups']:.1f} %" if tier.get("lookups") else "-"

    print_table(
        ("tier", "state", "used", "of", "%", "chunks", "lookups", "hits", "hit rate", "evicted"),
        [
            (
                name,
                _state(tier),
                size(tier, "usage_bytes"),
                size(tier, "capacity_bytes"),
                f"{tier['usage_percent']:.1f}" if "usage_percent" in tier else "-",
                *(tier.get(field, "-") for field in ("entries", "lookups", "hits")),
                rate(tier),
                tier.get("evicted", "-"),
            )
            for name, tier in tiers.items()
        ],
        right=("used", "of", "%", "chunks", "lookups", "hits", "hit rate", "evicted"),
    )


def _state(tier: dict[str, Any]) -> str:
    if not tier.get("enabled", True):
        return "off"
    return "down" if tier.get("up") is False else "up"


def _print_counts(what: str, counts: dict[str, int]) -> None:
    some = [(reason, count) for reason, count in counts.items() if count]
    if some:
        typer.echo(f"\n{what}:")
        print_table(("reason", "count"), some, right=("count",))
