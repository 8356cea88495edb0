"""Packages that come with an extra: what is missing says what to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Wraps imports of an extra's packages; a missing one names the extra.

    Raises ModuleNotFoundError with one sentence. A missing module of kvpolicy itself passes on.

    Example:
        `with extra("plots"): from matplotlib.figure import Figure`
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "kvpolicy").split(".")[0]
        if package == "kvpolicy":
            raise
        raise ModuleNotFoundError(
            f"the package {package} is not installed; pip install 'kvpolicy[{name}]' brings it",
            name=error.name,
        ) from error
