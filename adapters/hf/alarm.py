"""How a rank says, outside of any exchange, that it broke off, and how the others stop waiting."""

from __future__ import annotations

import atexit
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

PERIOD = 0.2  # seconds between two looks of a rank that waits in a kernel
_LAST_LOOK = 5.0  # seconds that the end of a process waits for one under way


class Alarm:
    """Of one group of ranks, through the store at which they met."""

    def __init__(self, mesh: Any, axis: int) -> None:
        self.kernels = mesh.device_type == "cuda"  # wait, not the host
        self.key = f"kvpolicy/failed/{mesh.get_group(axis).group_name}"
        store: Any = distributed_c10d._get_default_store()
        # A connection of its own, since the other may be waiting; not all stores have one.
        self.store = store.clone() if hasattr(store, "clone") else store
        self.lock = threading.Lock()  # of the store

    def ring(self, rank: int) -> None:
        """Says that `rank` broke off, unless another one did before."""
        with contextlib.suppress(Exception), self.lock:  # the store may have gone with its process
            self.store.compare_set(self.key, "", str(rank))

    def rung(self) -> int | None:
        """The rank that broke off first, as far as is known."""
        with contextlib.suppress(Exception):
            return self._told()
        return None

    def _told(self) -> int | None:
        with self.lock:
            return int(self.store.get(self.key)) if self.store.check([self.key]) else None

    def release(self, mesh: Any, axis: int) -> None:
        """Lets go of the group, so that nobody waits for this rank any more.

        NCCL's kernels of this rank end; gloo's connections close with the last reference.
        """
        with contextlib.suppress(Exception):
            if self.kernels:
                distributed_c10d._abort_process_group(mesh.get_group(axis))
            else:
                dist.destroy_process_group(mesh.get_group(axis))
        for each in gc.get_objects():  # other meshes of the model's know the group as well
            if type(each) is DeviceMesh:  # other objects may answer isinstance by a warning
                vars(each).get("_pg_registry", {}).clear()

    def listen(self, rank: int, broken: Callable[[], None]) -> None:
        """Calls the method `broken` once when another rank broke off, as long as its object lives.

        A kernel of NCCL's waits for a peer on the same host until the group's time-out, whatever
        has become of it; a closed connection ends gloo's waits.
        """
        if not self.kernels:
            return
        over, told = threading.Event(), weakref.WeakMethod(broken)

        def look() -> None:
            found = None
            with contextlib.suppress(Exception):  # the store has gone, and all that it tells
                while found is None and not over.wait(PERIOD) and told() is not None:
                    found = self._told()
            if found not in (None, rank) and (ends := told()) is not None:
                ends()
            atexit.unregister(stop)

        def stop() -> None:
            over.set()
            thread.join(_LAST_LOOK)

        # A thread in the store's code when the interpreter ends would abort the process.
        thread = threading.Thread(target=look, name="kvpolicy-alarm", daemon=True)
        atexit.register(stop)
        thread.start()
