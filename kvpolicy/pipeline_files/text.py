"""JSON and YAML to and from plain values; what a file must not say is refused before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 22  # of a file: a pattern of a thousand layers takes less
JSON, YAML = (".json",), (".yaml", ".yml")


def is_file_name(name: str) -> bool:
    """Whether a name is one of a pipeline's file."""
    return Path(name).suffix in JSON + YAML


def check_suffix(path: Path) -> None:
    """Raises ValueError unless the name says in which language the file is."""
    if not is_file_name(path.name):
        raise ValueError(f"path: wanted a name ending in .json, .yaml or .yml, got {str(path)!r}")


def dumps(data: Any, path: Path) -> str:
    """The text of a file."""
    if path.suffix in JSON:
        return json.dumps(data, indent=2, allow_nan=False) + "\n"
    import yaml

    text: str = yaml.safe_dump(data, sort_keys=False)
    return text


def read(path: Path) -> Any:
    """What a file says.

    Raises:
        ValueError: it is too large, or no JSON or YAML of plain values; the message names it.
    """
    check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path}: wanted at most {MOST_BYTES:,} bytes, got {size:,}")
    try:
        text = path.read_text(encoding="utf-8")
        return _json(text) if path.suffix in JSON else _yaml(text)
    except (ValueError, RecursionError) as error:
        nested = isinstance(error, RecursionError)
        raise ValueError(f"{path}: {'nested too deeply' if nested else error}") from error


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once, parse_constant=_constant)


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"wanted finite numbers, got {name}")


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """The safe loader, without aliases and without keys that stand twice."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("an alias (*) may repeat itself without end; write it out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            self.flatten_mapping(node)
            pairs = [
                (self.construct_object(key, deep=True), self.construct_object(value, deep=True))
                for key, value in node.value
            ]
            return _once(pairs)

    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, TypeError) as error:  # a key that is a list has no hash
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error
