"""Text files that are whole or as they were before."""

from __future__ import annotations

import uuid
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a file beside `path` and renames it, so that a failing disk costs nothing.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
