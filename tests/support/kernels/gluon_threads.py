"""Gluon kernels run as Python: each partition is a thread, and barriers are what they say.

Triton's interpreter does not know Gluon. What is checked so is the logic: which rows are copied
where, what masks hide, and that no partition waits for what never comes. Products are whole when
they are issued; that each is waited for is the compiler's and the device's matter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language import constexpr

PATIENCE = 20  # seconds without any progress that count as a deadlock


class Pointer:
    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        # Addresses count from the tensor's first element, in its storage.
        self.base, self.offset = base, offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.base, self.offset + more)

    def __sub__(self, less: Any) -> Pointer:
        return Pointer(self.base, self.offset - less)

    def _flat(self) -> tuple[Tensor, Tensor]:
        flat = torch.empty(0, dtype=self.base.dtype).set_(self.base.untyped_storage())
        return flat, torch.as_tensor(self.offset) + self.base.storage_offset()

    def load(self, mask: Any = None, other: Any = None) -> Tensor:
        flat, at = self._flat()
        if mask is None:
            assert bool((at >= 0).all() and (at < len(flat)).all()), "reads outside"
            return flat[at]
        seen = torch.as_tensor(mask).expand_as(at)
        inside = (at >= 0) & (at < len(flat))
        assert bool((inside | ~seen).all()), "reads outside"
        return torch.where(seen, flat[torch.where(seen, at, 0)], torch.as_tensor(other).to(flat))

    def store(self, value: Tensor, mask: Any = None) -> None:
        flat, at = self._flat()
        at, value = torch.broadcast_tensors(at, value)
        seen = torch.ones_like(at).bool() if mask is None else torch.as_tensor(mask).expand_as(at)
        assert bool((at[seen] >= 0).all() and (at[seen] < len(flat)).all()), "writes outside"
        flat[at[seen]] = value[seen].to(flat.dtype)


class Descriptor:
    def __init__(self, given: Any) -> None:
        self.given, self.dtype, self.layout = given, given.base.dtype, given.layout
        count = torch.Size(given.block_shape).numel()
        self.block_type = SimpleNamespace(nbytes=count * given.base.element_size())

    def read(self, place: list[Any]) -> Tensor:
        (rows, columns), (step, _), (n, m) = (
            self.given.shape, self.given.strides, self.given.block_shape,
        )  # fmt: skip
        r, c = (int(x) + torch.arange(size) for x, size in zip(place, (n, m), strict=True))
        inside = ((r >= 0) & (r < rows))[:, None] & ((c >= 0) & (c < columns))[None]
        pointer = Pointer(self.given.base, r[:, None] * step + c[None])
        return pointer.load(inside, 0.0)


class Barrier:
    """Counts arrivals and bytes; a phase ends when both are complete."""

    def __init__(self, lock: threading.Condition) -> None:
        self.lock, self.count, self.left, self.bytes, self.phase = lock, 0, 0, 0, 0

    def change(self, arrivals: int, bytes_: int) -> None:
        with self.lock:
            assert self.count, "a barrier that nobody initialised"
            self.left -= arrivals
            self.bytes += bytes_
            assert self.left >= 0, "more arrivals than the barrier counts"
            if not self.left and not self.bytes:
                self.left, self.phase = self.count, self.phase ^ 1
                self.lock.notify_all()

    def wait(self, phase: Any) -> None:
        with self.lock:
            if not self.lock.wait_for(lambda: self.phase != int(phase), PATIENCE):
                raise AssertionError("a deadlock")


class Shared:
    """Shared memory: a tensor, or barriers."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def index(self, at: Any) -> Shared:
        return Shared(self.item[int(at)])

    def permute(self, order: tuple[int, int]) -> Shared:
        return Shared(self.item.permute(order))

    @property
    def dtype(self) -> torch.dtype:
        return self.item.dtype


def _product(a: Any, b: Shared, acc: Tensor, use_acc: Any = True, is_async: bool = False) -> Tensor:
    left = a.item if isinstance(a, Shared) else a
    found = left.float() @ b.item.float()
    return acc + found if use_acc else found


def _barrier_of(x: Shared) -> Barrier:
    return x.item[0] if isinstance(x.item, list) else x.item


def _language(program: int, programs: int) -> dict[str, Any]:
    lock = threading.Condition()

    def allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
        if dtype is not torch.int64:
            return Shared(torch.full(shape, float("nan"), dtype=dtype))
        nested = [[Barrier(lock)] for _ in range(shape[0])]
        return Shared(nested if len(shape) == 2 else nested[0])

    def specialize(work: list[Any], warps: list[int], registers: list[int]) -> None:
        failed: list[BaseException] = []

        def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
            except BaseException as error:  # noqa: BLE001  # raised below, in the caller's thread
                failed.append(error)

        threads = [threading.Thread(target=run, args=part, daemon=True) for part in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def load(descriptor: Descriptor, place: list[Any], barrier: Shared, to: Shared) -> None:
        to.item.copy_(descriptor.read(place))
        _barrier_of(barrier).change(0, -descriptor.block_type.nbytes)

    def init(x: Shared, count: int) -> None:
        barrier = _barrier_of(x)
        barrier.count = barrier.left = count

    # As scalars and tensors of torch, whose dtypes stand for Gluon's.
    tensor = torch.as_tensor
    gl = SimpleNamespace(
        program_id=lambda axis: torch.tensor(program, dtype=torch.int32),
        num_programs=lambda axis: torch.tensor(programs, dtype=torch.int32),
        arange=lambda a, b, layout=None: torch.arange(a, b, dtype=torch.int32),
        load=lambda pointer, mask=None, other=None: pointer.load(mask, other),
        store=lambda pointer, value, mask=None: pointer.store(value, mask),
        minimum=lambda a, b: torch.minimum(tensor(a), tensor(b)),
        maximum=lambda a, b: torch.maximum(tensor(a), tensor(b)),
        where=lambda c, a, b: torch.where(tensor(c), a, b),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp2=torch.exp2,
        expand_dims=lambda x, axis: x.unsqueeze(axis), convert_layout=lambda x, layout: x,
        static_range=range, allocate_shared_memory=allocate, warp_specialize=specialize,
        NVMMADistributedLayout=lambda *_: None, SliceLayout=lambda *_: None,
        DotOperandLayout=lambda *_: None,
        int32=torch.int32, int64=torch.int64, float32=torch.float32,
    )  # fmt: skip
    barriers = SimpleNamespace(
        MBarrierLayout=lambda: None, init=init,
        expect=lambda x, n: _barrier_of(x).change(1, n),
        arrive=lambda x, count: _barrier_of(x).change(count, 0),
        wait=lambda x, phase: _barrier_of(x).wait(phase),
    )  # fmt: skip
    return {
        "gl": gl, "mbarrier": barriers, "_load": load, "warpgroup_mma": _product,
        "warpgroup_mma_wait": lambda n, deps: deps[0] if len(deps) == 1 else deps,
        "fence_async_shared": lambda: None,
    }  # fmt: skip


class Threads:
    """A launcher in the place of a kernel of `module`."""

    def __init__(self, module: ModuleType, kernel: GluonJITFunction) -> None:
        self.module, self.kernel, self.launched = module, kernel, 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*given: Any, **constants: Any) -> None:
            arguments = [
                Descriptor(x) if hasattr(x, "block_shape") else
                Pointer(x) if isinstance(x, Tensor) else x for x in given
            ]  # fmt: skip
            for program in range(grid[0]):
                names = dict(vars(self.module)) | _language(program, grid[0])
                for name, x in vars(self.module).items():
                    if isinstance(x, GluonJITFunction):
                        names[name] = FunctionType(x.fn.__code__, names)
                    elif isinstance(x, constexpr):
                        names[name] = x.value
                FunctionType(self.kernel.fn.__code__, names)(*arguments, **constants)
            self.launched += 1

        return launch
