"""A YAML file of which it is known where each key stands."""

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import yaml

MERGE = "tag:yaml.org,2002:merge"


class YamlFile:
    """The content of a YAML file, and the lines of its keys.

    Raises:
        OSError: the file can't be read.
        UnicodeDecodeError: it is not UTF-8.
        yaml.YAMLError: it is not YAML.
    """

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self._tree = yaml.compose(text, Loader=yaml.SafeLoader)
        # Unquoted dates are text to Prefect.
        self.data: Any = _dates_as_text(yaml.safe_load(text))

    def line(self, *keys: str | int) -> int:
        """Return the line, from 1, of a key or of the nearest thing around it that is there."""
        node, line = self._tree, 1
        for key in keys:
            found = _child(node, key)
            if found is None:
                break
            line, node = found
        return line

    def repeated_keys(self) -> list[tuple[int, str]]:
        """Return line and name of every key that stands a second time in its mapping."""
        return sorted(set(_repeated_keys(self._tree, set())))


def _child(node: yaml.Node | None, key: str | int) -> tuple[int, yaml.Node] | None:
    """Return line and node of what `key` leads to, through merge keys too."""
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        item = node.value[key]
        return item.start_mark.line + 1, item
    if not isinstance(node, yaml.MappingNode):
        return None
    for name, value in node.value:
        if name.value == key:
            return name.start_mark.line + 1, value
    for name, value in node.value:
        if name.tag == MERGE:
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for one in merged:
                if found := _child(one, key):
                    return found
    return None


def _repeated_keys(node: yaml.Node | None, visited: set[int]) -> Iterator[tuple[int, str]]:
    if node is None or id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key.value, str):
                if key.value in seen:
                    yield key.start_mark.line + 1, key.value
                seen.add(key.value)
            yield from _repeated_keys(value, visited)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated_keys(item, visited)


def _dates_as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dates_as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_dates_as_text(item) for item in value]
    return value.isoformat() if isinstance(value, date) else value
