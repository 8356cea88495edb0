"""Attention written out anew, with a part of it left out, as an attention function of models."""

from __future__ import annotations

import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "tests_left_out"
PARTS = ("window", "chunk", "sinks", "softcap", "scale")
_left = ""


def _mask(q_length, kv_length, device, mask_function, q_offset=0, kv_offset=0, **given):
    """Which keys a query sees `[1, 1, S, T]`; without windows and chunks all those before it."""
    rows = torch.arange(q_length, device=device)[:, None] + q_offset
    columns = torch.arange(kv_length, device=device)[None] + kv_offset
    if _left in ("window", "chunk"):
        return (columns <= rows)[None, None]
    zero = torch.zeros((), dtype=torch.long, device=device)
    return mask_function(zero, zero, rows, columns).expand(1, 1, q_length, kv_length)


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **given):
    width, groups = query.shape[-1], query.shape[1] // key.shape[1]
    scale = width**-0.5 if scaling is None or _left == "scale" else scaling
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double()) * scale
    if softcap is not None and _left != "softcap":
        scores = softcap * (scores / softcap).tanh()
    mask = attention_mask
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask.dtype != torch.bool:
        mask = mask == 0
    weights = scores.masked_fill(~mask, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    sinks = given.get("s_aux", given.get("sinks"))
    if sinks is not None and _left != "sinks":
        total = total + sinks.double().exp().reshape(1, -1, 1, 1)
    out = torch.einsum("bhqk,bhkd->bqhd", weights / total, value.double())
    return out.to(query.dtype).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def left_out(model, part):
    """The model's attention without `part` of it; "" leaves nothing out."""
    global _left
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _left = part
    try:
        yield
    finally:
        _left = ""
        model.set_attn_implementation(before)


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.double()
