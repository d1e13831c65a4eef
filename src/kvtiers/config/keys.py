"""The settings that exist, read off the models: for the reference, for "did you mean", and for names of environment variables."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kvtiers.config.sizes import format_exact

ENV_PREFIX: Final = "KVTIERS_"
ENV_SEPARATOR: Final = "__"

KeyPath = tuple[str, ...]
"""From the top of the file down: ("storage", "cpu", "buffer_size")."""


@dataclass(frozen=True, slots=True)
class SettingInfo:
    """One setting, for people."""

    path: KeyPath
    attributes: KeyPath
    """The same path in Python, where `async` is `async_`."""
    default: str
    unit: str
    allowed: str
    effect: str
    has_fixed_default: bool
    """False: none, or one that depends on other settings; `default` then says so in words."""

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def env(self) -> str:
        return env_name(self.path)


def env_name(path: KeyPath) -> str:
    """The variable that overrides the setting at `path`."""
    return ENV_PREFIX + ENV_SEPARATOR.join(path).upper()


@cache
def settings_of(model: type[BaseModel]) -> tuple[SettingInfo, ...]:
    """Every setting below `model`, in the order of the file."""
    return tuple(_walk(model, (), ()))


@cache
def sections_of(model: type[BaseModel]) -> frozenset[KeyPath]:
    """Every path that is a mapping and not a value; () is the whole."""
    found: set[KeyPath] = {()}
    for setting in settings_of(model):
        found.update(setting.path[:depth] for depth in range(1, len(setting.path)))
    return frozenset(found)


def keys_in(model: type[BaseModel], section: KeyPath) -> list[str]:
    """The valid keys of a section, in the order of the file."""
    depth = len(section)
    paths = (setting.path for setting in settings_of(model) if setting.path[:depth] == section)
    return list(dict.fromkeys(path[depth] for path in paths if len(path) > depth))


def nearest_key(model: type[BaseModel], path: KeyPath) -> str | None:
    """The valid key somebody meant: a like one in the same section, else one of that name elsewhere; None if nothing is near."""
    section, name = path[:-1], path[-1].lower().replace("-", "_")
    here = get_close_matches(name, keys_in(model, section), n=1)
    if here:
        return here[0]
    everywhere = [*sections_of(model), *(setting.path for setting in settings_of(model))]
    by_name = {".".join(known): known[-1] for known in everywhere if known}
    for near in get_close_matches(name, sorted(set(by_name.values())), n=1, cutoff=0.8):
        owners = sorted(dotted for dotted, last in by_name.items() if last == near)
        return (
            " or ".join(owners)
            if len(owners) <= 2
            else f"{near} in one of {', '.join(o.rpartition('.')[0] for o in owners)}"
        )
    return None


def _walk(model: type[BaseModel], path: KeyPath, attributes: KeyPath) -> Iterator[SettingInfo]:
    for attribute, field in model.model_fields.items():
        here = (*path, field.alias or attribute)
        there = (*attributes, attribute)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _walk(kind, here, there)
        else:
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            yield SettingInfo(
                path=here,
                attributes=there,
                default=str(extra.get("shown_default") or write_value(field.default, str(extra.get("unit")))),
                unit=str(extra.get("unit", "")),
                allowed=str(extra.get("allowed") or _allowed(field)),
                effect=field.description or "",
                has_fixed_default=not extra.get("shown_default"),
            )


def write_value(value: object, unit: str = "") -> str:
    """A value as one would write it in the file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, int) and unit == "size":
        return format_exact(value)
    if isinstance(value, tuple | list):
        return str(value[0]) if len(value) == 1 else f"[{', '.join(map(str, value))}]"
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value)


def _allowed(field: FieldInfo) -> str:
    kind, metadata = _unwrap(field.annotation, list(field.metadata))
    if get_origin(kind) is Literal:
        return " or ".join(str(choice) for choice in get_args(kind))
    if kind is bool:
        return "true or false"
    if kind in {int, float}:
        bounds = _bounds(metadata)
        return "a whole number" + bounds if kind is int else "a number" + bounds
    return "a text"


def _unwrap(kind: Any, metadata: list[Any]) -> tuple[Any, list[Any]]:
    """The bare type behind Annotated and `| None`, and all constraints met on the way."""
    while True:
        if get_origin(kind) is Annotated:
            metadata += getattr(kind, "__metadata__", ())
            kind = get_args(kind)[0]
        elif get_origin(kind) in {Union, types.UnionType}:
            others = [arg for arg in get_args(kind) if arg is not type(None)]
            if len(others) != 1:
                return kind, metadata
            kind = others[0]
        else:
            return kind, metadata


def _bounds(metadata: list[Any]) -> str:
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    found: Mapping[str, Any] = {
        name: getattr(item, name)
        for name in words
        for item in metadata
        if getattr(item, name, None) is not None
    }
    listed = [f"{words[name]} {write_value(found[name])}" for name in words if name in found]
    return f", {' and '.join(listed)}" if listed else ""
