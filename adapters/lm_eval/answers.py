"""lm-eval's file of answers (`--use_cache`), which does not say of which model they are."""

from __future__ import annotations

from typing import Any


def keyed(answers: Any, key: str) -> None:
    """Puts `key` before the key of every answer, so that one file serves many pipelines.

    lm-eval looks in the object that it hands to the model's hook; a class of its own in place of
    the object's is what changes both.
    """
    kind: Any = type(answers)

    class Keyed(kind):  # type: ignore[misc]
        def __contains__(self, name: object) -> bool:
            return bool(super().__contains__(f"{key} {name}"))

        def __getitem__(self, name: str) -> Any:
            return super().__getitem__(f"{key} {name}")

        def __setitem__(self, name: str, answer: Any) -> None:
            super().__setitem__(f"{key} {name}", answer)

    answers.__class__ = Keyed
