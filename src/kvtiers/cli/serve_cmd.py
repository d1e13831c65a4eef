"""`kvtiers serve`: the cache of this machine, for the engines on it."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvtiers.cli.output import note

if TYPE_CHECKING:
    from kvtiers.cli.http_edge import HttpEdge
    from kvtiers.config import CacheConfig

app = typer.Typer(add_completion=False)

_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


@app.command()
def serve(
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE", help="The YAML file.", exists=True, dir_okay=False)
    ],
    *,
    socket: Annotated[
        Path | None,
        typer.Option(
            "--socket",
            metavar="PATH",
            help="Where engines connect. Default: $XDG_RUNTIME_DIR/kvtiers/node.sock, else kvtiers-UID/node.sock in the temporary directory.",
        ),
    ] = None,
    lease_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="A client that holds slots and is silent for so long counts as stopped.",
        ),
    ] = 60.0,
    memory_wait: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="How long to wait for engines to let go of the memory of the service before.",
        ),
    ] = 15.0,
    http: Annotated[
        bool,
        typer.Option(
            help="Metrics and the API on observability.metrics_port, not on the operator's Unix socket only."
        ),
    ] = True,
    with_process: Annotated[
        int | None,
        typer.Option(
            "--with-process",
            metavar="PID",
            min=1,
            help="End when that process ends: an engine's own service.",
        ),
    ] = None,
    log_level: Annotated[str, typer.Option(metavar="LEVEL", help="debug, info or warning.")] = "info",
) -> None:
    """Keep one cache for all engines on this machine. SIGTERM writes out what was accepted and ends.

    Engines connect over the socket and copy KV through shared memory; if the service ends, their requests are misses until it is back.
    """
    from kvtiers.config import CacheConfig
    from kvtiers.node.address import default_socket, operator_socket
    from kvtiers.node.service import Service, stop_on_signals, stop_with

    if log_level not in _LEVELS:
        raise typer.BadParameter(
            f"{log_level!r} is not one of {', '.join(_LEVELS)}", param_hint="--log-level"
        )
    logging.basicConfig(
        level=_LEVELS[log_level], stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    path = (socket or default_socket()).absolute()
    settings = CacheConfig.from_yaml(config)
    service = Service(settings, path, lease_timeout_s=lease_timeout, memory_wait_s=memory_wait)
    stop_on_signals(service)
    if with_process is not None:
        stop_with(service, with_process)
    with ExitStack() as undo:
        extra = []
        edge = _http_edge(settings, operator_socket(path), port=http)
        if edge is not None:
            undo.callback(edge.close)
            extra.append(edge)
        ended = service.run(extra=extra, on_ready=lambda: note(f"kvtiers serves at {path}"))
    if not ended:
        note(
            "ended with work unfinished at async.close_timeout_s; what was not written is lost from the cache"
        )


def _http_edge(settings: CacheConfig, operator: Path, *, port: bool) -> HttpEdge | None:
    from kvtiers.model.errors import ConfigError

    try:
        from kvtiers.cli.http_edge import HttpEdge
    except ImportError as error:
        if port:
            raise ConfigError(
                [f"the HTTP side needs more packages ({error}): pip install 'kvtiers[serve]', or --no-http"]
            ) from error
        note(f"no operator's socket, as a package is missing ({error}): pip install 'kvtiers[serve]'")
        return None
    return HttpEdge(settings, operator, port=port)
