"""From what pydantic found wrong to what an operator can mend: key, value, where it was written, what is allowed, what was meant.

All problems at once: a problem may hide others (contradictions are looked for only where each value is sound by itself), so what was
reported is taken out and the rest is validated again, until nothing is left. What contradicts a reported value is not reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from kvtiers.config.keys import KeyPath, keys_in, nearest_key, sections_of, settings_of

_ROUNDS: Final = 20
_SHOWN: Final = 60
_ABSENT: Final = object()
_PASSWORD: Final = re.compile(r"(?<=:)[^/]*(?=@)")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend. `where`: "file:line" or "env NAME", empty if it was given in a program."""

    path: KeyPath
    message: str
    value: Any = _ABSENT
    where: str = ""

    def text(self) -> str:
        key = ".".join(self.path)
        key = key if key.isprintable() else json.dumps(key)
        value = "" if self.value is _ABSENT else f" = {shown(self.value)}"
        where = f" ({self.where})" if self.where else ""
        return f"{key}{value}{where}: {self.message}".lstrip(" :")


def shown(value: object) -> str:
    """A value in a message: short, in the notation of the file, without a password in a URL."""
    if isinstance(value, Mapping):
        text = "{…}"
    else:
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):
            text = repr(value)
    text = without_password(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def without_password(text: str) -> str:
    """`redis://user:secret@host` with stars for the secret."""
    return _PASSWORD.sub("***", text)


def all_problems(
    model: type[BaseModel], values: Mapping[str, Any], sources: Mapping[KeyPath, str] | None = None
) -> list[Problem]:
    """Everything that keeps `values` from being a `model`, in the order of the file. `sources` says where a value was written."""
    tree = _copy(values)
    found: dict[KeyPath, Problem] = {}
    spoilt: set[KeyPath] = set()
    for _ in range(_ROUNDS):
        try:
            model.__pydantic_validator__.validate_python(tree)
            break
        except ValidationError as error:
            touched = [
                path
                for reported, involved in _reports(model, tree, error, sources or {})
                for path in _note(reported, involved, found, spoilt)
            ]
        removed = [_remove(tree, path) for path in touched]
        if not any(removed):
            break
    return list(found.values())


def _note(
    reported: Problem, involved: list[KeyPath], found: dict[KeyPath, Problem], spoilt: set[KeyPath]
) -> list[KeyPath]:
    if spoilt.isdisjoint(involved):
        found.setdefault(reported.path, reported)
    spoilt.update(involved)
    return involved


def _reports(
    model: type[BaseModel], tree: Mapping[str, Any], error: ValidationError, sources: Mapping[KeyPath, str]
) -> Iterator[tuple[Problem, list[KeyPath]]]:
    """Each error as a problem, with every path it is about."""
    for detail in error.errors(include_url=False):
        if detail["type"] == "default_factory_not_called":  # the field it depends on is reported
            continue
        path = tuple(str(step) for step in detail["loc"])
        context = detail.get("ctx", {})
        keys = context.get("keys", ()) if detail["type"] == "setting" else ()
        if keys:
            involved = [(*path, key) for key in keys]
            written = [there for there in involved if there in sources]
            where = ", ".join(dict.fromkeys(sources[there] for there in written))
            yield Problem(involved[0], context["message"], _lookup(tree, involved[0]), where), involved
            continue
        path = _known_part(model, path, detail["type"])
        value = detail["input"] if path == tuple(map(str, detail["loc"])) else _lookup(tree, path)
        yield Problem(path, _message(model, path, detail), value, _source(sources, path)), [path]


def _known_part(model: type[BaseModel], path: KeyPath, kind: str) -> KeyPath:
    """Without the steps into a value (an index of a list, a branch of a union)."""
    if kind == "extra_forbidden":
        return path
    known = {setting.path for setting in settings_of(model)} | sections_of(model)
    while path not in known:
        path = path[:-1]
    return path


def _message(model: type[BaseModel], path: KeyPath, detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        return unknown_key(model, path)
    if path in sections_of(model):
        return f"must be a mapping with the keys {', '.join(keys_in(model, path))}"
    if detail["type"] == "setting":
        return str(detail["ctx"]["message"])
    allowed = next(setting.allowed for setting in settings_of(model) if setting.path == path)
    return f"has no value; allowed is {allowed}" if detail["input"] is None else f"must be {allowed}"


def unknown_key(model: type[BaseModel], path: KeyPath) -> str:
    """What to say of a key that does not exist."""
    if path[:-1] not in sections_of(model):
        return "unknown key"
    near = nearest_key(model, path)
    return (
        f"unknown key; did you mean {near}?"
        if near
        else f"unknown key; valid here: {', '.join(keys_in(model, path[:-1]))}"
    )


def _source(sources: Mapping[KeyPath, str], path: KeyPath) -> str:
    return sources.get(path, "")


def _lookup(tree: Any, path: Iterable[str]) -> Any:
    for step in path:
        if not isinstance(tree, Mapping) or step not in tree:
            return _ABSENT
        tree = tree[step]
    return tree


def _remove(tree: Any, path: KeyPath) -> bool:
    for step in path[:-1]:
        if not isinstance(tree, dict) or step not in tree:
            return False
        tree = tree[step]
    return isinstance(tree, dict) and tree.pop(path[-1] if path else "", _ABSENT) is not _ABSENT


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value
