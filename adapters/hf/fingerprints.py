"""Fingerprints of a model: of all that a cache depends on, and of the keys that a gate reads."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from .models import attention_modules
from .wrappers import decoder_of

SAMPLES = 64  # elements read of each parameter
_VOLATILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the model's config and of a few elements of every parameter.

    Tells fine-tuned or merged weights from others; an edit that spares every sampled element goes
    unnoticed. What a cache holds follows from all of these, its dtype included.
    """
    decoder = decoder_of(model)
    config = {
        name: value
        for name, value in decoder.config.to_dict().items()
        if name not in _VOLATILE and "attn_implementation" not in name
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    samples = [_sample(weight) for weight in [*decoder.parameters(), *_stored_buffers(decoder)]]
    for device in {sample.device for sample in samples}:
        here = [sample for sample in samples if sample.device == device]
        digest.update(_readable(torch.cat(here)).numpy().tobytes())
    return digest.hexdigest()


def keys_fingerprint(model: nn.Module) -> str:
    """A short hash of a model's attention shape and of its first key projection in bf16.

    Names the keys that a gate was trained on, whatever dtype the model is loaded in and whatever
    adapters change elsewhere.
    """
    config = decoder_of(model).config
    heads = getattr(config, "num_attention_heads", None)
    shape = (
        config.model_type,
        config.num_hidden_layers,
        heads,
        getattr(config, "num_key_value_heads", heads),
        config.hidden_size,
        config.vocab_size,
    )
    module = attention_modules(model)[0]
    projection = getattr(module, "k_proj", module)  # all of it where keys are not made apart
    weight: Any = getattr(projection, "weight", None)
    digest = hashlib.sha256(repr(shape).encode())
    parts: Iterable[Tensor] = [weight]
    if not isinstance(weight, Tensor):  # or packed under other names
        parts = itertools.chain(projection.parameters(), projection.buffers())
    for part in parts:
        bits = _readable(part).to(torch.bfloat16).contiguous().view(torch.uint8)
        digest.update(bits.numpy().tobytes())
    return digest.hexdigest()[:16]


def _stored_buffers(decoder: nn.Module) -> Iterator[Tensor]:
    """Buffers that checkpoints hold: the weights of some quantised layers."""
    for module in decoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def _sample(weight: Tensor) -> Tensor:
    local = getattr(weight, "to_local", lambda: weight)().detach().flatten()
    step = max(local.numel() // SAMPLES, 1)
    return local[::step][:SAMPLES].float()


def _readable(weight: Tensor) -> Tensor:
    """`weight` on the CPU; raises UnsupportedError where its values are not there."""
    if weight.device.type == "meta":
        raise UnsupportedError(
            "model: a fingerprint needs its weights, which accelerate keeps elsewhere; load it "
            "without offloading"
        )
    return weight.detach().cpu()
