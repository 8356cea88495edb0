"""Parts of a long measurement, each written when it is done, so that a later run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from .._files import write_text

Part = dict[str, Any]


@attrs.frozen
class Finished:
    """The parts that a folder holds; `settings` are what all of them were made with."""

    folder: Path
    settings: Mapping[str, Any]

    def of(self, name: str, make: Callable[[], Part]) -> Part:
        """The part of this name: what an earlier run wrote, or else what `make` gives.

        Raises:
            ValueError: it was made with other settings, or its file is damaged.
        """
        path = self.folder / f"{name}.json"
        wanted = json.loads(json.dumps(dict(self.settings)))
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                settings, part = found["settings"], dict(found["part"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"out: {path} is damaged ({error}); delete it") from error
            other = sorted(k for k in {*settings, *wanted} if settings.get(k) != wanted.get(k))
            if other:
                raise ValueError(
                    f"out: {path} was made with another {', '.join(other)}; take another folder"
                )
            return part
        part = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"settings": wanted, "part": part}, indent=1))
        return part
