"""The command `kvpolicy`: planning memory, training, evaluation, benchmarks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from .._extras import extra

if TYPE_CHECKING:
    from .commands import app as app
else:

    def __getattr__(name: str) -> Any:
        """`app` is made when it is asked for: it needs typer, which the extra `cli` brings."""
        if name != "app":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with extra("cli"):
            from .commands import app
        globals()["app"] = app
        return app


def main() -> None:
    """The console script; without the extra `cli` it says what to install and exits with 2."""
    try:
        with extra("cli"):
            import rich  # noqa: F401
            import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from .commands import app

    app()
