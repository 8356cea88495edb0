"""Triton's interpreter without its repeated work: half the time, the same results."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from triton.runtime import interpreter


def remember() -> None:
    """Keeps what the interpreter finds again at every operation, and leaves out what it drops."""
    _builtins()
    _patches()
    _dtypes()
    _overflow()


def _builtins() -> None:
    """Which members of triton.language are builtins.

    The interpreter searches all of them at every call of a function by a kernel, most of which it
    has replaced by then; from the second search on only names that held one the first time are
    looked at.
    """
    names: dict[Any, list[str]] = {}

    def getmembers(package: Any) -> list[tuple[str, Any]]:
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, x in members if interpreter.tl.core.is_builtin(x)]
        return [(name, getattr(package, name)) for name in names[package]]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})


def _patches() -> None:
    """What a module sees of triton.language is replaced once a launch, not at every call of its
    functions: it stays replaced until the launch ends.
    """
    patch, patched = interpreter._patch_lang, set[int]()

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            patched.clear()
            super().restore()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return Scope()
        patched.add(module)
        return patch(function)

    interpreter._LangPatchScope, interpreter._patch_lang = Scope, patch_once


def _dtypes() -> None:
    """numpy's dtype for each of Triton's, which has a name."""
    find, found = interpreter._get_np_dtype, dict[str, Any]()

    def numpy_dtype(dtype: Any) -> Any:
        if dtype.name not in found:
            found[dtype.name] = find(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = numpy_dtype


def _overflow() -> None:
    """Sums and products of integers are computed again in int64 only for an assertion that is
    dropped outside of debugging.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
