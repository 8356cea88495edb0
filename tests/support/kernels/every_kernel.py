"""Launches every kernel on small awkward sizes and compares with the reference.

Made for checkers that slow a launch down a hundred times (`make sanitize`):

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool initcheck \\
        python -m tests.support.kernels.every_kernel [--only OP] [--list]

Without the caching allocator each tensor is an allocation of its own, and what nobody wrote is
really unwritten. A device that the kernels compile for is wanted, or TRITON_INTERPRET=1 in the
environment. A whole run fails when there is a kernel that no case launches.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.jit import KernelInterface

import kvpolicy.kernels
from kvpolicy.kernels import sparse_prefill
from tests.support.kernels import prompt_cases  # noqa: F401  # registers its cases
from tests.support.kernels.mirror import Size
from tests.support.kernels.op_cases import CASES

CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
SIZES = [
    Size(dim=64, page=16, dtype=torch.bfloat16, group=1),
    Size(dim=80, page=4, dtype=torch.float32, group=3, first="high"),
    Size(dim=128, page=16, dtype=torch.bfloat16, group=5, first="high"),
    Size(dim=96, dim_v=64, page=16, dtype=torch.bfloat16, group=2),
]
TINY = [Size(dim=20, dim_v=12, page=4, dtype=torch.float32, group=2, first="high", prompt=40)]


def kernel_name(kernel: KernelInterface) -> str:
    return f"{kernel.fn.__module__.removeprefix('kvpolicy.kernels.')}.{kernel.fn.__name__}"


def entry_kernels() -> set[str]:
    """Every kernel of the library that no other kernel calls and that the device can run."""
    found = []
    for module in pkgutil.iter_modules(kvpolicy.kernels.__path__):
        name = f"kvpolicy.kernels.{module.name}"
        members = vars(importlib.import_module(name)).values()
        found += [
            x for x in members
            if isinstance(x, KernelInterface) and x.fn.__module__ == name
            and (HOPPER or not isinstance(x, GluonJITFunction))
        ]  # fmt: skip
    called = [x.fn.__globals__.get(name) for x in found for name in x.fn.__code__.co_names]
    return {kernel_name(x) for x in found if all(x is not other for other in called)}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts launches by kernel."""
    kind, seen = type(sparse_prefill._attend), Counter[str]()
    run = kind.run

    def launch(self, *args, **kwargs):
        seen[kernel_name(self)] += 1
        return run(self, *args, **kwargs)

    with mock.patch.object(kind, "run", launch):
        yield seen


def main(arguments: list[str] | None = None, sizes: list[Size] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=sorted(CASES), help="run the case of one op")
    parser.add_argument("--list", action="store_true", help="print ops and kernels, run nothing")
    options = parser.parse_args(arguments)
    if options.list:
        print(*CASES, "", *sorted(entry_kernels()), sep="\n")
        return
    chosen = [CASES[options.only]] if options.only else list(dict.fromkeys(CASES.values()))
    with counted() as seen:
        for function in chosen:
            names = [op for op, other in CASES.items() if other is function]
            for size in sizes or (SIZES if CUDA else TINY):
                print(*names, size, flush=True)
                function(size)
    print(f"{seen.total()} launches of {len(seen)} kernels", flush=True)
    missing = entry_kernels() - set(seen)
    assert options.only or not missing, f"no case launches {', '.join(sorted(missing))}"


if __name__ == "__main__":
    main()
