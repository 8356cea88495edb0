"""The script that checkers run launches every kernel, and says so where one is left out."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from kvpolicy.backend import _MODULES
from tests.support.kernels import every_kernel, op_cases
from tests.support.kernels.bounds import within_arguments

KERNELS = Path(__file__).parents[2] / "kernels"


def compiled_functions() -> list[tuple[str, ast.FunctionDef]]:
    """Every function that Triton compiles."""
    return [
        (f"{path.stem}.{node.name}", node)
        for path in KERNELS.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(x) for x in node.decorator_list)
    ]


def test_kernels_are_short_and_say_what_they_do() -> None:
    found = compiled_functions()
    assert len(found) > 50
    assert not [name for name, node in found if not ast.get_docstring(node)]
    assert not [name for name, node in found if node.end_lineno - node.lineno + 1 > 90]


def test_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.nullcontext() if every_kernel.CUDA else within_arguments():
        every_kernel.main([], every_kernel.TINY)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].endswith(f"of {len(every_kernel.entry_kernels())} kernels")
    assert {op for line in printed[:-1] for op in line.split(" Size")[0].split()} == set(_MODULES)


@triton.jit
def _reaches(x, out, by, WRITES: tl.constexpr):
    """Reads or writes one value, so many after the first."""
    if WRITES:
        tl.store(out + by, 1.0)
    else:
        tl.store(out, tl.load(x + by))


@pytest.mark.skipif(every_kernel.CUDA, reason="a checker of memory is a tool of its own there")
@pytest.mark.parametrize("writes", [False, True])
def test_a_kernel_that_leaves_its_arguments_is_named(writes: bool) -> None:
    x, out = torch.zeros(4), torch.zeros(4)
    with within_arguments():
        _reaches[1,](x, out, 3, writes)
        for far in (4, -1, 1 << 40):
            with pytest.raises(Exception, match="_reaches: 1 accesses outside of what it"):
                _reaches[1,](x, out, far, writes)


def test_a_forgotten_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"append": op_cases.CASES["append"]}
    monkeypatch.setattr(every_kernel, "CASES", kept)
    with pytest.raises(AssertionError, match=r"no case launches .*cache_write\._decode_write, "):
        every_kernel.main([], every_kernel.TINY)
    every_kernel.main(["--only", "append"], every_kernel.TINY)
