"""`kvtiers config check FILE`, `kvtiers config reference` and `kvtiers config preset NAME`."""

from __future__ import annotations

import sys
import textwrap
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtiers.cli.output import JSON_OPTION, note, print_json, print_table

if TYPE_CHECKING:
    from kvtiers.config import CacheConfig, Fitted
    from kvtiers.config.keys import SettingInfo
    from kvtiers.model.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Check a configuration, show every setting there is, or write one to start from.",
)


@app.command()
def check(
    file: Annotated[str, typer.Argument(help="The YAML file; - reads standard input.", metavar="FILE")],
    *,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fail (exit code 2) also if it does not fit this machine.")
    ] = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Print every setting in force, where its value comes from, and what fits on this machine.

    Overrides such as KVTIERS_STORAGE__CPU__BUFFER_SIZE=4Gi count.

    Exit code 2 if the configuration is wrong, or asks for what a cache
    refuses to start with. If it is only too large for this machine, that is
    a warning: a file may be for another one.
    """
    from kvtiers.config import fit as fit_machine
    from kvtiers.model.errors import ConfigError, DoesNotFit
    from kvtiers.runtime.plan import refusals

    try:
        config = _read(file)
        problems = refusals(config)
        if problems:
            raise ConfigError(problems, source=file)
    except ConfigError as error:
        if not as_json:
            raise
        print_json({"file": file, "valid": False, "problems": error.problems})
        raise typer.Exit(2) from None
    fitted: Fitted | DoesNotFit
    try:
        fitted = fit_machine(config)
    except DoesNotFit as error:
        fitted = error
    if as_json:
        print_json(_report(file, config, fitted))
    else:
        _print_settings(config)
        _print_fit(config, fitted)
    if fit and isinstance(fitted, DoesNotFit):
        raise typer.Exit(2)


@app.command()
def reference(*, as_json: Annotated[bool, JSON_OPTION] = False) -> None:
    """Print every setting with its default, its unit and its effect, as a commented YAML file to start from."""
    from kvtiers.config import CacheConfig
    from kvtiers.config.keys import settings_of

    settings = settings_of(CacheConfig)
    if as_json:
        print_json(
            {
                one.key: {
                    "default": one.default,
                    "unit": one.unit,
                    "allowed": one.allowed,
                    "effect": one.effect,
                    "env": one.env,
                }
                for one in settings
            }
        )
    else:
        typer.echo(commented_yaml(settings))


@app.command()
def preset(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="aggressive, long-document, shared or cost-first.", show_default=False
        ),
    ],
    *,
    as_described: Annotated[
        bool,
        typer.Option(
            "--as-described", help="The pattern's own sizes, for a large machine, instead of scaled ones."
        ),
    ] = False,
    path: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the disk tier goes. Default: /var/cache/lmcache, else ~/.cache/kvtiers.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write there instead of to standard output.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there.")] = False,
) -> None:
    """Write a configuration for one way of use, as commented YAML with sizes that fit this machine.

    aggressive: short conversations, many at a time; host memory, no disk.
    long-document: RAG and long documents; a large, compressed disk tier.
    shared: several instances that share KV through Mooncake.
    cost-first: little memory, much disk, the rest in S3.
    """
    from kvtiers.config import CacheConfig
    from kvtiers.config.presets import PATTERNS, described, machine_for_preset, scaled

    if name not in PATTERNS:
        near = get_close_matches(name.lower().replace("_", "-"), PATTERNS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(PATTERNS)}{meant}", param_hint="NAME")
    if path is not None and PATTERNS[name].disk is None:
        raise typer.BadParameter(f"the preset {name} has no disk tier", param_hint="--path")
    if force and output is None:
        raise typer.BadParameter("goes with --output", param_hint="--force")
    text = described(name, path) if as_described else scaled(name, machine_for_preset(name, path))
    config = CacheConfig.from_text(text, name=f"preset {name}", environ={})
    if output is None:
        typer.echo(text, nl=False)
    else:
        _write_file(output, text, force=force)
    for warning in _warnings(config):
        note(f"warning: {warning}")


def _write_file(output: Path, text: str, *, force: bool) -> None:
    try:
        with output.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise typer.BadParameter(
            f"{output} is there already; --force replaces it", param_hint="--output"
        ) from None
    except OSError as error:
        raise typer.BadParameter(
            f"{output} can't be written: {error.strerror}", param_hint="--output"
        ) from None
    note(f"wrote {output}")


def commented_yaml(settings: tuple[SettingInfo, ...]) -> str:
    """A configuration of defaults. Settings without a fixed default are commented out, so that it parses to the defaults."""
    lines = [
        "# Every setting of kvtiers with its default. Each can be overridden by an environment variable:",
        f"# {settings[0].key} by {settings[0].env}, and so on.",
    ]
    open_sections: tuple[str, ...] = ()
    for one in settings:
        section = one.path[:-1]
        for depth, name in enumerate(section):
            if open_sections[: depth + 1] != section[: depth + 1]:
                lines += ["", f"{'  ' * depth}{name}:"]
                open_sections = section[: depth + 1]
        open_sections = section
        indent = "  " * len(section)
        first = lines[-1].endswith(":") and not lines[-1].lstrip().startswith("#")
        lines += _comment(one, indent) if first else ["", *_comment(one, indent)]
        lines.append(
            f"{indent}{one.path[-1]}: {one.default}"
            if one.has_fixed_default
            else f"{indent}# {one.path[-1]}:"
        )
    return "\n".join(lines)


def _comment(one: SettingInfo, indent: str) -> list[str]:
    facts = [one.effect]
    if one.allowed != "true or false":
        facts.append(f"Allowed: {one.allowed}.")
    if one.unit not in {"", "size"}:
        facts.append(f"Unit: {one.unit}.")
    if not one.has_fixed_default:
        facts.append(f"Default: {one.default}.")
    prefix = f"{indent}# "
    return textwrap.wrap(
        " ".join(facts), 100, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False
    )


def _read(file: str) -> CacheConfig:
    from kvtiers.config import CacheConfig

    if file == "-":
        return CacheConfig.from_text(sys.stdin.read(), name="stdin")
    return CacheConfig.from_yaml(Path(file))


def _print_settings(config: CacheConfig) -> None:
    from kvtiers.config.keys import write_value
    from kvtiers.config.problems import without_password

    print_table(
        ("key", "value", "source"),
        [
            (
                one.setting.key,
                without_password(write_value(one.value, one.setting.unit))
                + _readable(one.value, one.setting.unit),
                one.source,
            )
            for one in config.effective()
        ],
    )


def _readable(value: Any, unit: str) -> str:
    from kvtiers.config.sizes import format_exact, format_size

    odd = unit == "size" and isinstance(value, int) and value >= 1024 and format_exact(value).isdigit()
    return f" ({format_size(value)})" if odd else ""


def _print_fit(config: CacheConfig, fitted: Fitted | ConfigError) -> None:
    from kvtiers.config import Fitted, format_size

    typer.echo("")
    for warning in _warnings(config):
        note(f"warning: {warning}")
    if not isinstance(fitted, Fitted):
        note("warning: it is valid, but does not fit this machine; a cache would not start here:")
        for problem in fitted.problems:
            note(f"  - {problem}")
        return
    storage = config.storage
    cpu = format_size(fitted.cpu_bytes)
    device = "simulated in host memory" if storage.gpu.device == "cpu" else f"on {storage.gpu.device}"
    gpu = (
        f"{format_size(fitted.gpu_bytes)}, {device}"
        if fitted.gpu
        else "none: storage.gpu.capacity is not set"
    )
    paths = ", ".join(map(str, fitted.disk_paths))
    typer.echo("It fits this machine:")
    typer.echo(f"  gpu     {gpu}")
    typer.echo(f"  cpu     {cpu}" if storage.cpu.enabled else f"  cpu     disabled; {cpu} for staging loads")
    typer.echo(
        f"  disk    {format_size(fitted.disk_bytes)} in {paths}" if fitted.disk else "  disk    disabled"
    )
    typer.echo(f"  remote  {_remote(config)}")


def _missing_remote(config: CacheConfig) -> str | None:
    from kvtiers.runtime.remote_plan import what_is_missing

    remote = config.storage.remote
    return what_is_missing(remote) if remote.enabled else None


def _remote(config: CacheConfig) -> str:
    remote = config.storage.remote
    if not remote.enabled:
        return "disabled"
    if _missing_remote(config) is not None:
        return "none: see the warning"
    return f"{remote.backend} at {remote.endpoint}; whether it answers is not checked here"


def _warnings(config: CacheConfig) -> list[str]:
    """What is asked for and a cache would go without, and what can't be told from here."""
    storage = config.storage
    warnings: list[str] = []
    missing = _missing_remote(config)
    if missing is not None:
        warnings.append(f"{missing}. A cache says so at start and runs without the remote tier")
    elif storage.remote.enabled:
        from kvtiers.runtime.remote_plan import without_effect

        warnings += without_effect(config)
    if storage.gpu.capacity is not None and storage.gpu.device != "cpu":
        warnings.append(
            f"storage.gpu.capacity: whether {storage.gpu.device} is there and has so much free is not checked here; "
            "a cache needs torch with CUDA for it"
        )
    return warnings


def _report(file: str, config: CacheConfig, fitted: Fitted | ConfigError) -> dict[str, Any]:
    from kvtiers.config import Fitted

    ok = isinstance(fitted, Fitted)
    report: dict[str, Any] = {
        "file": file,
        "valid": True,
        "settings": {
            one.setting.key: {
                "value": _json_value(one.value),
                "unit": _json_unit(one.setting.unit),
                "source": one.source,
            }
            for one in config.effective()
        },
        "fits": ok,
        "warnings": _warnings(config),
    }
    if isinstance(fitted, Fitted):
        report["bytes"] = {"gpu": fitted.gpu_bytes, "cpu": fitted.cpu_bytes, "disk": fitted.disk_bytes}
    else:
        report["fit_problems"] = fitted.problems
    return report


def _json_unit(unit: str) -> str:
    """Sizes are written as bytes there."""
    return "bytes" if unit == "size" else unit


def _json_value(value: Any) -> Any:
    from kvtiers.config.problems import without_password

    return without_password(value) if isinstance(value, str) else value
