"""Entry point of `kvtiers` and `lmcache-cli`.

A command `NAME` is the module `kvtiers.cli.NAME_cmd`, which exposes `app`, a `typer.Typer`: with one command it is that command,
with several or a callback a group. It is imported when it is asked for; a new command needs no line here.

Exit codes: 0 done, 1 it failed, 2 the command line or the configuration is wrong. With `--json` whatever a command raises is
JSON too, `{"error": …}`; only a command line that can't be parsed leaves stdout empty.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

import kvtiers
import kvtiers.cli
from kvtiers.cli.output import print_json
from kvtiers.model.errors import ConfigError, KvtiersError

_SUFFIX: Final = "_cmd"
_COMPLETION: Final = {"install_completion", "show_completion"}


def command_names() -> list[str]:
    """Every command there is a module for."""
    modules = (module.name for module in pkgutil.iter_modules(kvtiers.cli.__path__))
    return sorted(name.removesuffix(_SUFFIX).replace("_", "-") for name in modules if name.endswith(_SUFFIX))


class CommandFiles(TyperGroup):
    """A group whose commands are the modules of this package."""

    def list_commands(self, ctx: Any) -> list[str]:
        return command_names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        names = command_names()
        # An unknown name loads all of them: typer looks there for "did you mean".
        for name in [cmd_name] if cmd_name in names else names:
            if name not in self.commands:
                self.commands[name] = _load(name)
        return super().get_command(ctx, cmd_name)


def _load(name: str) -> Any:
    module = import_module(f"kvtiers.cli.{name.replace('-', '_')}{_SUFFIX}")
    command = typer.main.get_command(module.app)
    command.name = name
    command.params = [param for param in command.params if param.name not in _COMPLETION]
    return command


app = typer.Typer(
    cls=CommandFiles,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A tiered KV cache for LLM serving: GPU, CPU memory, local disk, remote store.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvtiers {kvtiers.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options that stand before any command."""


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process') and give its exit code."""
    try:
        app(args=None if args is None else list(args))
    except SystemExit as finished:
        return _exit_code(finished)
    except KvtiersError as error:
        typer.echo(f"error: {error}", err=True)
        if "--json" in (sys.argv[1:] if args is None else args):
            print_json({"error": str(error)})
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _exit_code(finished: SystemExit) -> int:
    if finished.code is None or isinstance(finished.code, int):
        return finished.code or 0
    typer.echo(finished.code, err=True)
    return 1


def main() -> None:
    """The console script."""
    sys.exit(run())
