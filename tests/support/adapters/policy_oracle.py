"""A model of any type whose attention is what a pipeline should compute, in float64.

One forward over the whole text, by the masks that transformers makes and the decisions of an
admission: a layer that sees all keys sees those that are near or admitted.
"""

from __future__ import annotations

import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from kvpolicy import Write
from kvpolicy.adapters.hf.rule.untouched import configs_of

NAME = "tests_policy_oracle"
_now = None


class Oracle:
    """`admission` with a `window` on the layers that see all keys; `acted` counts these."""

    def __init__(self, admission, window):
        self.admission, self.window = admission, window
        self.keys, self.acted = [], 0

    def layer(self, key):
        """Which layer with keys of its own these are of; one reads another's, the tensor itself."""
        for index, held in enumerate(self.keys):
            if held is key:
                return index
        self.keys.append(key)
        return len(self.keys) - 1

    def seen(self, key, value, mask):
        """`[1, Hkv, S, S]`: what queries see of each head's keys."""
        layer, size = self.layer(key), key.shape[2]
        if not bool(mask[..., -1, 0].all()):  # it slides, or a chunk has begun
            return mask.expand(1, key.shape[1], size, size)
        self.acted += 1
        at, heads = torch.arange(size), range(key.shape[1])
        write = Write(key[0], value[0], at, torch.tensor([0, size]), layer, heads)
        admitted = self.admission.admit(write)[None, :, None]
        return mask & ((at[:, None] - at < self.window) | admitted)


def _mask(q_length, kv_length, device, mask_function, q_offset=0, kv_offset=0, **given):
    rows = torch.arange(q_length, device=device)[:, None] + q_offset
    columns = torch.arange(kv_length, device=device)[None] + kv_offset
    zero = torch.zeros((), dtype=torch.long, device=device)
    return mask_function(zero, zero, rows, columns).expand(1, 1, q_length, kv_length)


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **given):
    mask = attention_mask
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
    mask = mask if mask.dtype == torch.bool else mask == 0
    groups = query.shape[1] // key.shape[1]
    seen = _now.seen(key, value, mask).repeat_interleave(groups, 1)
    k, v = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), k)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~seen, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    sinks = given.get("s_aux", given.get("sinks"))
    if sinks is not None:
        total = total + sinks.double().exp().reshape(1, -1, 1, 1)
    out = torch.einsum("bhqk,bhkd->bqhd", weights / total, v)
    return out.to(query.dtype).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def oracle(model, admission, window):
    """Lets `model` attend as a pipeline of `admission` should."""
    global _now
    configs = configs_of(model)
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME
    _now = Oracle(admission, window)
    try:
        yield _now
    finally:
        _now = None
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
