"""A command run anew where only the loopback is: for one that starts servers which would listen on every address of the host."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import typer


def again_in_own_network(ctx: typer.Context) -> None:
    """Run this command in a network namespace and end with its exit code. Returns if there can be none, and the servers are refused."""
    from kvtiers.testing.own_network import in_own_network

    command = in_own_network([sys.executable, "-m", "kvtiers", *_words(ctx)])
    if command is not None:
        raise typer.Exit(subprocess.run(command, check=False).returncode)  # noqa: S603 - this very command


def _words(ctx: typer.Context) -> list[str]:
    """The command with its options, as they were parsed."""
    names: list[str] = []
    step: Any = ctx
    while step.parent is not None:
        names.insert(0, str(step.info_name))
        step = step.parent
    words = []
    for param in ctx.command.params:
        value, option = ctx.params.get(str(param.name)), param.opts[-1]
        if value is None or value is False:
            continue
        if value is True:
            words.append(option)
        else:
            words += [f"{option}={one}" for one in (value if isinstance(value, list | tuple) else [value])]
    return [*names, *words]
