"""Overrides from the environment: `KVTIERS_STORAGE__CPU__BUFFER_SIZE=4Gi`. Pure: the environment comes as a mapping.

A name that looks like an override and is none is a problem, not ignored: an operator who set it believes that it works.
A value is what it would be in the file, with two differences: an empty one counts as not set, and a list is written `[a, b]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import yaml
from pydantic import BaseModel

from kvtiers.config.keys import ENV_PREFIX, ENV_SEPARATOR, KeyPath, keys_in, settings_of


@dataclass(slots=True)
class Overrides:
    """What the environment sets, by path; which variable set it; and names that set nothing."""

    values: dict[KeyPath, Any] = field(default_factory=dict)
    names: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_overrides(model: type[BaseModel], environ: Mapping[str, str]) -> Overrides:
    """All overrides in `environ`. Other variables with our prefix (without a `__` in them) are none of ours."""
    known = {setting.env: setting.path for setting in settings_of(model)}
    found = Overrides()
    for name in sorted(environ):
        if not _is_meant(model, name) or not environ[name].strip():
            continue
        path = known.get(name)
        if path is None:
            found.problems.append(_unknown(name, environ[name], known))
        else:
            found.values[path] = _value(environ[name])
            found.names[path] = name
    return found


def _is_meant(model: type[BaseModel], name: str) -> bool:
    if not name.startswith(ENV_PREFIX):
        return False
    rest = name.removeprefix(ENV_PREFIX)
    sections = tuple(f"{section.upper()}_" for section in keys_in(model, ()))
    return ENV_SEPARATOR in rest or rest.startswith(sections)


def _unknown(name: str, value: str, known: Mapping[str, KeyPath]) -> str:
    squeezed = {_squeeze(one): one for one in known}
    near = get_close_matches(_squeeze(name), squeezed, n=1, cutoff=0.75)
    meant = f"; did you mean {squeezed[near[0]]}?" if near else "; `kvtiers config reference` lists all"
    levels = " (levels are separated by two underscores)" if near and _squeeze(name) == near[0] else ""
    return f"env {name}={value}: no such setting{meant}{levels}"


def _squeeze(name: str) -> str:
    return name.upper().replace("_", "")


def _value(text: str) -> Any:
    text = text.strip()
    if text.lower() == "null":
        return None
    if text.startswith("[") and text.endswith("]"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text
