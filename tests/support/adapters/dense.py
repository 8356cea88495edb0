"""A model whose attention is the float64 oracle: one sequence, no cache, no padding."""

from __future__ import annotations

import copy

import torch
from transformers import AttentionInterface

from kvpolicy import CacheSpec
from tests.support.oracle import Oracle
from tests.support.rules import evict


def _attend(module, query, key, value, mask, **kwargs):
    run = module.__dict__["oracle_run"]
    oracle = run.oracles[module.layer_idx]
    step = oracle.prompt if run.phase == "prompt" else oracle.decode
    out = step(query[0], key[0], value[0], run.pre)
    return out.transpose(0, 1)[None].to(query.dtype).contiguous(), None


AttentionInterface.register("kvp_oracle", _attend)


class Dense:
    """Feeds `model` token by token, or a prompt at once, through oracles of `pipeline`."""

    def __init__(self, model, pipeline, *, sliding=None, **sizes):
        config = model.config
        spec = CacheSpec(
            layers=config.num_hidden_layers, heads=4, kv_heads=2, head_dim=16,
            sliding=sliding or _sliding(config), **sizes,
        )  # fmt: skip
        self.oracles = [Oracle(pipeline, spec, layer) for layer in range(spec.layers)]
        self.pipeline, self.interval, self.checked = pipeline, spec.interval, 0
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("kvp_oracle")
        for layer in self.model.model.layers:
            layer.self_attn.__dict__["oracle_run"] = self
            layer.self_attn.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, module, args, kwargs):
        hidden = kwargs["hidden_states"]
        keys = module.k_proj(hidden).view(*hidden.shape[:2], 2, 16)
        if hasattr(module, "k_norm"):
            keys = module.k_norm(keys)
        self.pre = keys[0].transpose(0, 1)

    def _run(self, ids, phase):
        self.phase = phase
        at = self.oracles[0].n + torch.arange(len(ids))
        out = self.model(input_ids=ids[None], position_ids=at[None], use_cache=False)
        return out.logits[0, -1]

    def prompt(self, ids, end=True):
        """Logits after the last of `ids` `[S]`."""
        logits = self._run(ids, "prompt")
        if end and not self.pipeline.eviction.neutral:
            self._evict()
        return logits

    def decode(self, token):
        logits = self._run(token[None], "decode")
        n = self.oracles[0].n
        decoding = self.pipeline.eviction.when == "decode"
        if decoding and n // self.interval > self.checked // self.interval:
            self._evict()
        return logits

    def _evict(self):
        evict(self.oracles)
        self.checked = self.oracles[0].n

    def kept(self, layer, head):
        oracle = self.oracles[layer]
        return [
            *([] if oracle.slides else oracle.pages(head)),
            *range(max(oracle.n - oracle.W, 0), oracle.n),
        ]


def _sliding(config):
    if config.model_type == "mistral":
        return (config.sliding_window,) * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or []
    found = tuple(config.sliding_window if k == "sliding_attention" else None for k in kinds)
    return found if any(found) else ()


def follow(dense, ids, tokens):
    """Logits `[N, V]` that decide each of `tokens` `[N]` after the prompt `ids`."""
    found = [dense.prompt(ids)]
    found += [dense.decode(token) for token in tokens[:-1]]
    return torch.stack(found)
