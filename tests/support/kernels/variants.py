"""What a device would have compiled of kernels that the interpreter is asked to run."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

Compiled = dict[str, set[tuple[Any, ...]]]


def variants(monkeypatch: pytest.MonkeyPatch, run: bool) -> Compiled:
    """By kernel, with what each variant is compiled for; filled from now on.

    Without `run` nothing is computed.
    """
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend
    from triton.runtime.interpreter import InterpretedFunction

    found: Compiled = defaultdict(set)
    original = InterpretedFunction.run

    def launched(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        given = dict(zip(self.arg_names, args, strict=False)) | named
        plain = self.kwargs.get("do_not_specialize") or ()
        unaligned = self.kwargs.get("do_not_specialize_on_alignment") or ()
        fixed = {name for name, kind in self.fn.__annotations__.items() if "constexpr" in str(kind)}

        def kind(name: str) -> Any:
            if name in fixed or name not in self.arg_names:  # options of the compiler are no names
                return given[name]
            where = name not in plain, name not in unaligned
            return native_specialize_impl(BaseBackend, given[name], False, *where)

        found[self.fn.__name__].add(tuple((name, kind(name)) for name in sorted(given)))
        return original(self, *args, grid=grid, warmup=warmup, **named) if run else None

    monkeypatch.setattr(InterpretedFunction, "run", launched)
    return found


def new(compiled: Compiled, before: Compiled) -> dict[str, int]:
    """How many variants of which kernels were not there before."""
    found = {name: len(kinds - before.get(name, set())) for name, kinds in compiled.items()}
    return {name: count for name, count in found.items() if count}
