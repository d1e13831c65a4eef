"""A YAML file as a tree that remembers the line of every key. Pure but for reading the file.

Stricter than YAML where silence would hurt: a key given twice is a problem, not "the last one wins". Bounded in size and in what
aliases may blow it up to; no tags beyond YAML's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml

from kvtiers.config.keys import KeyPath
from kvtiers.model.errors import ConfigError

_MAX_BYTES: Final = 256 * 1024
_MAX_NODES: Final = 10_000
_TAGS: Final = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
"""Of mappings and lists; scalars are left to PyYAML's safe loader."""


@dataclass(slots=True)
class YamlTree:
    """`values` as nested dicts with str keys, the line (from 1) each path was written on, and what is wrong beyond the syntax."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def where(self, line: int) -> str:
        return f"{self.name}:{line}"


def read_yaml(path: Path) -> YamlTree:
    """Raises ConfigError if the file can't be read or is no YAML mapping."""
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        _refuse(
            name,
            f"there is no such file; the current directory is {Path.cwd()}"
            if not path.is_absolute()
            else "there is no such file",
        )
    except IsADirectoryError:
        _refuse(name, "is a directory; give the YAML file in it")
    except OSError as error:
        _refuse(name, f"can't be read: {error.strerror}")
    if len(raw) > _MAX_BYTES:
        _refuse(name, f"is larger than {_MAX_BYTES // 1024} KiB: not a configuration file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        _refuse(name, f"line {line} is not UTF-8 text")
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> YamlTree:
    """Raises ConfigError if `text` is no YAML mapping; an empty text is refused too: it is rarely meant."""
    tree = YamlTree(name)
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                _refuse(name, "is empty; write `storage: {}` for a configuration of defaults")
            if not isinstance(root, yaml.MappingNode):
                _refuse(name, f"must be a mapping with keys such as storage, and is {_kind(root)}")
            tree.values = _Walk(loader, tree).mapping(root, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        _refuse(name, f"{line}not valid YAML: {_said(error)}{_hint(text, mark)}")
    except yaml.reader.ReaderError as error:
        line_number = text[: error.position].count("\n") + 1
        _refuse(
            name, f"line {line_number}: not valid YAML: a character that is not allowed ({error.character!r})"
        )
    except RecursionError:
        _refuse(name, "is nested too deeply")
    return tree


class _Walk:
    """From nodes to values, noting lines and duplicates."""

    def __init__(self, loader: yaml.SafeLoader, tree: YamlTree) -> None:
        self._loader = loader
        self._tree = tree
        self._budget = _MAX_NODES
        self._open: set[int] = set()  # nodes being walked: an alias to one of them has no end

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        self._duplicates(node, path)
        self._loader.flatten_mapping(node)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else _kind(key_node)
            here = (*path, key)
            self._tree.lines[here] = key_node.start_mark.line + 1
            values[key] = self._value(value_node, here)
        return values

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._budget -= 1
        if self._budget < 0:
            _refuse(self._tree.name, f"has more than {_MAX_NODES} entries (aliases counted each time)")
        if id(node) in self._open:
            _refuse(self._tree.name, f"line {node.start_mark.line + 1}: {'.'.join(path)} contains itself")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in _TAGS:
            line = node.start_mark.line + 1
            _refuse(self._tree.name, f"line {line}: the tag {node.tag} has no meaning here")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            return [self._value(item, path) for item in node.value]
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self._loader.construct_object(node, deep=True)
        except ValueError:  # such as the date 2024-99-99
            return node.value

    def _duplicates(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first: dict[str, int] = {}
        for key_node, line in _scalar_keys(node):
            if key_node in first:
                key = ".".join((*path, key_node))
                self._tree.problems.append(
                    f"{key} ({self._tree.where(line)}): given twice, first on line {first[key_node]}; keep one"
                )
            first.setdefault(key_node, line)


def _scalar_keys(node: yaml.MappingNode) -> Iterator[tuple[str, int]]:
    for key_node, _ in node.value:
        if isinstance(key_node, yaml.ScalarNode):
            yield str(key_node.value), key_node.start_mark.line + 1


def _said(error: yaml.MarkedYAMLError) -> str:
    return ": ".join(part for part in (error.context, error.problem) if part)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


def _hint(text: str, mark: yaml.Mark | None) -> str:
    lines = text.splitlines()
    if mark is None or mark.line >= len(lines):
        return ""
    line = lines[mark.line]
    indent = line[: len(line) - len(line.lstrip())]
    return " (YAML is indented with spaces, not tabs)" if "\t" in indent else ""


def _refuse(name: str, message: str) -> NoReturn:
    raise ConfigError([message], source=name) from None
