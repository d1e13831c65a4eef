"""`kvtiers status`: whether a service runs, and how it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvtiers.cli.output import JSON_OPTION, print_json, print_table
from kvtiers.cli.running_service import SOCKET_OPTION, TOKEN_OPTION, URL_OPTION, RunningService

app = typer.Typer(add_completion=False)


@app.command()
def status(
    *,
    url: Annotated[str | None, URL_OPTION] = None,
    socket: Annotated[Path | None, SOCKET_OPTION] = None,
    token_file: Annotated[Path | None, TOKEN_OPTION] = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Tell whether a service serves, which of its backends work, and who is connected.

    Exit code 1 if none answers, it does not serve, or a backend is down.
    """
    with RunningService.reach(url, socket, token_file) as service:
        code, ready = service.ask("/readyz")
        serves = code == 200 and ready.get("ready") is True
        stats = service.get("/api/v1/cache/stats") if serves else {}
        where = service.where
    report = _report(where, ready, stats, serves=serves)
    if as_json:
        print_json(report)
    else:
        _print(report)
    if not report["ok"]:
        raise typer.Exit(1)


def _report(where: str, ready: dict[str, Any], stats: dict[str, Any], *, serves: bool) -> dict[str, Any]:
    backends = ready.get("backends", {})
    return {
        "where": where,
        "ok": serves and all(one["status"] == "up" for one in backends.values()),
        "serves": serves,
        "backends": backends,
        "engines": stats.get("service", {}).get("clients", []),
        "chunks": stats.get("chunks"),
        "queue_size": stats.get("async", {}).get("queue_size"),
    }


def _print(report: dict[str, Any]) -> None:
    if not report["serves"]:
        typer.echo(f"the service at {report['where']} does not serve (yet, or any more)")
        return
    typer.echo(
        f"serving at {report['where']}: {report['chunks']} chunks known, {report['queue_size']} tasks waiting"
    )
    for name, backend in report["backends"].items():
        checked = backend.get("checked_s_ago")
        why = f": {backend['error']}" if backend.get("error") else ""
        when = "" if checked is None else f", checked {checked:.0f} s ago"
        typer.echo(f"  {name} is {backend['status']}{when}{why}")
    engines = report["engines"]
    if not engines:
        typer.echo("no engine is connected")
        return
    from kvtiers.config.sizes import format_size

    print_table(
        ("engine", "holding", "oldest", "storing", "GPU in use", "prefill tokens/s"),
        [
            (
                one["name"],
                one["holding"],
                f"{one['oldest_s']:.1f} s" if one["holding"] else "-",
                format_size(one["process_storing_bytes"]),
                "-" if one["gpu_usage"] is None else f"{100 * one['gpu_usage']:.0f} %",
                "-" if one["prefill_tokens_per_s"] is None else f"{one['prefill_tokens_per_s']:.0f}",
            )
            for one in engines
        ],
        right=("holding", "oldest", "storing", "GPU in use", "prefill tokens/s"),
    )
