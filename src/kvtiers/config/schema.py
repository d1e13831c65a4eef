"""The whole configuration: the LMCache-compatible YAML file, overrides of the environment, and where each value came from.

Parsing never looks at the machine: a file for a large host reads the same on a laptop. `kvtiers.config.fit` is the second step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from pydantic import Field, PrivateAttr

from kvtiers.config.environment import Overrides, read_overrides
from kvtiers.config.fields import Count, Number, setting
from kvtiers.config.keys import KeyPath, SettingInfo, sections_of, settings_of
from kvtiers.config.problems import all_problems
from kvtiers.config.section import Section
from kvtiers.config.storage import StorageConfig
from kvtiers.config.yaml_file import YamlTree, parse_yaml, read_yaml
from kvtiers.model.errors import ConfigError

DEFAULT: Final = "default"
ARGUMENT: Final = "argument"


class RetryPolicy(Section):
    """How often, and how soon, a failed call to a store is tried again."""

    max_retries: Count = setting(3, "Tries after the first. Only for failures that may pass.", ge=0, le=100)
    backoff_factor: Number = setting(
        2.0, "Each wait is this many times the one before it, with some randomness.", ge=1, le=100
    )


class AsyncConfig(Section):
    """The work in the background."""

    max_workers: Count = setting(
        4, "Threads for I/O, over all stores together; each store has one at least.", ge=1, le=1024
    )
    queue_size: Count = setting(
        1000,
        "I/O tasks that may wait. One beyond it is refused at once, and the chunk stays where it was.",
        unit="tasks",
        ge=1,
        le=1_000_000,
    )
    retry_policy: RetryPolicy = Field(default_factory=RetryPolicy)
    load_timeout_ms: Number = setting(
        2000.0,
        "How long a request may wait for chunks from disk or remote. At its end what is there counts, and the rest is computed.",
        unit="milliseconds",
        gt=0,
    )
    close_timeout_s: Number = setting(
        30.0,
        "Closing writes out what is left for so long, then stops whatever happens.",
        unit="seconds",
        ge=0,
    )


class ObservabilityConfig(Section):
    """What is shown to the operator."""

    http_host: str = setting(
        "127.0.0.1",
        "Address that the HTTP server listens on. One that other machines reach is refused without token_file, because the API can evict.",
        allowed="an IP address",
    )
    token_file: str | None = setting(
        None,
        "File with a bearer token, readable by its owner only. With it every path but /healthz and /readyz wants it.",
        allowed="a path",
        shown_default="no token",
    )

    metrics_port: Count = setting(
        8000,
        "Port of the HTTP server for metrics and the cache's API. Used by the service only: a cache inside another program opens no port.",
        unit="port",
        ge=0,
        le=65535,
        allowed="0 to 65535; 0 takes a free one",
    )
    health_check_interval: Number = setting(
        30.0,
        "How often each store is asked whether it works (a page is written, read and removed), whether it is used or not. Failures count like those of requests. One that is out of order is asked more often, and free space is looked at with each write.",
        unit="seconds",
        gt=0,
    )


@dataclass(frozen=True, slots=True)
class EffectiveValue:
    """A setting as it is in force. `source`: default, argument, "file:line" or "env NAME"."""

    setting: SettingInfo
    value: Any
    source: str


class CacheConfig(Section):
    """Everything an operator decides. Made by `from_yaml`, or with keyword arguments; wrong input raises one ConfigError."""

    storage: StorageConfig = Field(default_factory=StorageConfig)
    async_: AsyncConfig = Field(default_factory=AsyncConfig, alias="async")
    observability: ObservabilityConfig = Field(default_factory=ObservabilityConfig)
    _sources: Mapping[KeyPath, str] | None = PrivateAttr(default=None)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], *, environ: Mapping[str, str] | None = None) -> Self:
        """The file, with the overrides in `environ` (default: this process'). Raises ConfigError with every problem."""
        return cls._from_tree(read_yaml(Path(path)), environ)

    @classmethod
    def from_text(cls, text: str, *, name: str = "text", environ: Mapping[str, str] | None = None) -> Self:
        """As `from_yaml`, from a string. `name` stands where the file's would."""
        return cls._from_tree(parse_yaml(text, name), environ)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, environ: Mapping[str, str] | None = None) -> Self:
        """As `from_yaml`, from what a YAML or JSON parser gave."""
        if not isinstance(values, Mapping):
            raise ConfigError(["must be a mapping with keys such as storage"])
        return cls._build(_copied(values), {}, [], "configuration", environ)

    @classmethod
    def _from_tree(cls, tree: YamlTree, environ: Mapping[str, str] | None) -> Self:
        sources = {path: tree.where(line) for path, line in tree.lines.items()}
        return cls._build(tree.values, sources, tree.problems, tree.name, environ)

    @classmethod
    def _build(
        cls,
        values: dict[str, Any],
        sources: dict[KeyPath, str],
        problems: list[str],
        name: str,
        environ: Mapping[str, str] | None,
    ) -> Self:
        overrides = read_overrides(cls, os.environ if environ is None else environ)
        _fill_empty_sections(values, sections_of(cls))
        _apply(overrides, values, sources)
        order = {path: index for index, path in enumerate(sources)}
        found = sorted(all_problems(cls, values, sources), key=lambda one: order.get(one.path, len(order)))
        problems = [*problems, *(one.text() for one in found), *overrides.problems]
        if problems:
            raise ConfigError(problems, source=name)
        config = cls.model_validate(values)
        config._sources = sources  # noqa: SLF001 - its own, but pydantic takes private values only afterwards
        return config

    def effective(self) -> list[EffectiveValue]:
        """Every setting in force, in the order of the file, with its source."""
        return [self._effective(info) for info in settings_of(type(self))]

    def source_of(self, key: str) -> str:
        """Where the value of "storage.cpu.buffer_size" came from. KeyError for a key that doesn't exist."""
        info = next((info for info in settings_of(type(self)) if info.key == key), None)
        if info is None:
            raise KeyError(key)
        return self._effective(info).source

    def _effective(self, info: SettingInfo) -> EffectiveValue:
        section: Any = self
        for attribute in info.attributes[:-1]:
            section = getattr(section, attribute)
        name = info.attributes[-1]
        if name not in section.model_fields_set:
            source = DEFAULT
        else:
            source = (self._sources or {}).get(info.path, ARGUMENT)
        return EffectiveValue(info, getattr(section, name), source)

    def __eq__(self, other: object) -> bool:
        """Equal values make equal configurations, wherever they came from."""
        return isinstance(other, CacheConfig) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((self.storage, self.async_, self.observability))


def _fill_empty_sections(values: dict[str, Any], sections: frozenset[KeyPath]) -> None:
    """`gpu:` with everything below it commented out is null in YAML, and means the defaults."""
    for path in sorted(sections, key=len):
        tree: Any = values
        for step in path[:-1]:
            tree = tree.get(step) if isinstance(tree, dict) else None
        if path and isinstance(tree, dict) and path[-1] in tree and tree[path[-1]] is None:
            tree[path[-1]] = {}


def _apply(overrides: Overrides, values: dict[str, Any], sources: dict[KeyPath, str]) -> None:
    """Set what the environment says. Where the file has a wrong thing in the way, that is reported and this not applied."""
    for path, value in overrides.values.items():
        tree: Any = values
        for step in path[:-1]:
            if isinstance(tree, dict):
                tree = tree.setdefault(step, {})
        if isinstance(tree, dict):
            tree[path[-1]] = value
            sources[path] = f"env {overrides.names[path]}"


def _copied(value: Any) -> Any:
    return {str(key): _copied(item) for key, item in value.items()} if isinstance(value, Mapping) else value
