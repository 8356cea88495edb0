"""Caches on the host: what is checked is copied there at once, not read piece by piece."""

from __future__ import annotations

import copy
import gc
import types
from itertools import accumulate, pairwise

import torch

from kvpolicy import Admission, Eviction, Selection
from kvpolicy.ops import load

POLICIES = (Admission, Selection, Eviction)


def tensors_of(*roots):
    """Every tensor that a collector finds from `roots`, policies' weights left out."""
    skip = (type, types.ModuleType, types.FunctionType, *POLICIES)
    found, seen, queue = [], set(), list(roots)
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, skip):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        else:
            queue.extend(gc.get_referents(thing))
    return found


def to_host(tensors):
    """Copies on the host, one transfer from each device; every storage stays one, of its size."""
    devices = {}
    for x in tensors:
        storage = x.untyped_storage()
        devices.setdefault(x.device, {})[storage.data_ptr()] = (x, storage.nbytes())
    copies = {}
    for device, storages in devices.items():
        whole = [
            x.as_strided((size // x.element_size(),), (1,), 0).view(torch.uint8)
            for x, size in storages.values()
        ]
        host = torch.cat(whole).cpu()
        ends = pairwise(accumulate((len(x) for x in whole), initial=0))
        for key, (start, end) in zip(storages, ends, strict=True):
            copies[device, key] = host[start:end].clone()
    return [
        copies[x.device, x.untyped_storage().data_ptr()]
        .view(x.dtype)
        .as_strided(x.shape, x.stride(), x.storage_offset())
        for x in tensors
    ]


def to_device(tensors, device):
    """Tensors of one type on a device by one transfer."""
    if device.type == "cpu":
        return tensors
    flat = torch.cat([x.flatten() for x in tensors]).to(device, non_blocking=True)
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def snapshot(states):
    """The same caches, pools shared as they are, with every tensor on the host.

    Pages of a pool lie one after the other, as the reference reads them. Caches that already are
    so come back themselves.
    """
    pools = {pool for state in states for pool in state.devices.pools}
    if all(pool.moving and pool.device.type == "cpu" for pool in pools):
        return states
    for pool in pools:
        if pool.orphans:
            _ = pool.available  # takes back the pages of caches that are gone
    found = tensors_of(*states)
    memo = {id(x): host for x, host in zip(found, to_host(found), strict=True)}
    for state in states:
        for layer in state.layers:
            memo |= {id(x): x for x in (layer.admission, layer.selection, layer.eviction)}
        memo |= {id(state.spec): state.spec, id(state.ops): load("reference")}
    hosts = copy.deepcopy(states, memo)
    for state in hosts:
        (device,) = state.devices._each.values()
        state.devices._each = {torch.device("cpu"): device}
    for pool in {pool for state in hosts for pool in state.devices.pools}:
        parts = zip(*pool.extents, strict=True)
        joined = [None if x[0] is None else torch.cat(x) for x in parts]
        pool.pages = pool.pages._replace(
            **dict(zip(("k", "v", "meta", "summary"), joined, strict=True))
        )
    return hosts
