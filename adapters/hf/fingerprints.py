"""Fingerprints of a model: of all that a cache depends on, and of the keys that a gate reads."""

from __future__ import annotations

import contextlib
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
    samples = [_sample(weight) for weight in [*_parameters(decoder), *_stored_buffers(decoder)]]
    # Each device is read once; what the hash sees does not depend on which there are.
    found: dict[int, Tensor] = {}
    for device in {sample.device for sample in samples}:
        own = [n for n, sample in enumerate(samples) if sample.device == device]
        whole = _readable(torch.cat([samples[n] for n in own]))
        parts = whole.split([samples[n].numel() for n in own])
        found |= zip(own, parts, strict=True)
    digest.update(torch.cat([found[n] for n in range(len(samples))]).numpy().tobytes())
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
        part = gathered(part)
        bits = _readable(part).to(torch.bfloat16).contiguous().view(torch.uint8)
        digest.update(bits.numpy().tobytes())
    return digest.hexdigest()[:16]


def gathered(weight: Any) -> Any:
    """A weight that ranks hold parts of as a whole; every rank must ask."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _parameters(decoder: nn.Module) -> Iterator[Tensor]:
    """Those of the decoder; of offloaded ones what accelerate's hooks bring."""
    for name, weight in decoder.named_parameters():
        yield _offloaded(decoder, name, weight) if weight.is_meta else weight


def _offloaded(decoder: nn.Module, name: str, weight: Tensor) -> Tensor:
    """What the hook of the parameter's module, or of one around it, holds under its name."""
    parts = name.split(".")
    for n in range(len(parts) - 1, -1, -1):
        hook = getattr(decoder.get_submodule(".".join(parts[:n])), "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            held = getattr(each, "weights_map", None)
            if held is not None:
                with contextlib.suppress(KeyError):
                    found: Tensor = held[".".join(parts[n:])]
                    return found
    return weight


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
