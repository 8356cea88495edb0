"""When the prompt calls of an attached decoder run by piecewise CUDA graphs, and by which."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ...errors import KVPolicyError
from .attached import Attached
from .cache import KVPolicyCache
from .capture import capture_failure
from .compile import FEW, CompiledLayers
from .held_fast import HOOKED, HeldFast
from .piecewise import COLUMNS, CapturedForward, kinds, new_pool, told_of
from .wrappers import takes_positions

EAGER = 2  # calls before the first capture: a program that asks once does not wait for it
_RECORDS = "output_hidden_states", "output_attentions", "output_router_logits"  # of configs


class ShortPrompts:
    """Runs short prompt calls of an attached decoder by graphs, where that is possible.

    `reason` says why it is not; None while nothing is against it.
    """

    def __init__(self, attachment: Attached, compiled: CompiledLayers) -> None:
        self.attachment, self.compiled = attachment, compiled
        decoder = attachment.decoder
        self.forward = decoder.forward
        self.names = list(inspect.signature(type(decoder).forward).parameters)[1:]
        self.reason = why_not(attachment, decoder)
        self.calls = 0
        self.held: HeldFast | None = None
        self.captured: dict[Any, CapturedForward] = {}
        self.pool: Any = None

    def clear(self) -> None:
        """Gives the graphs' memory back."""
        self.captured.clear()
        self.held = self.pool = None

    @property
    def said(self) -> str:
        """How short prompts are read."""
        if self.reason is not None:
            return f"eager: {self.reason}"
        if self.held is not None and self.held.hooked:
            return f"eager: {HOOKED}"
        return "captured" if self.captured else "not yet"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward."""
        if self.reason is None and not torch.compiler.is_compiling():
            named = dict(zip(self.names, args, strict=False)) | kwargs
            cache = self.attachment.cache
            columns = 0 if cache is None else self._columns(cache, named)
            if cache is not None and columns:
                found = self._graphs(cache, named, columns)
                if found is not None:
                    return found.replay(cache, named, columns)
        return self.forward(*args, **kwargs)

    def _columns(self, cache: KVPolicyCache, kwargs: dict[str, Any]) -> int:
        """Columns of a forward that graphs serve, 0 of others."""
        layout, told = cache.layout, told_of(kwargs)
        if layout is None or layout.decode or layout.batch > 1 or layout.index is not None:
            return 0
        if not 1 < layout.prompt < FEW or self.attachment.ranks.many:
            return 0
        on = cache.spec.device
        if torch.is_autocast_enabled(on.type) or any(x.device != on for x in told.values()):
            return 0
        config = self.attachment.decoder.config
        if any(getattr(config, name, False) for name in _RECORDS):
            return 0
        known = {"attention_mask", "past_key_values", "use_cache", "return_dict"}
        others = (x for name, x in kwargs.items() if name not in told and name not in known)
        return 0 if any(x is not None and x is not False for x in others) else layout.prompt

    def _graphs(
        self, cache: KVPolicyCache, kwargs: dict[str, Any], columns: int
    ) -> CapturedForward | None:
        self.calls += 1
        if self.calls <= EAGER:
            return None
        if self.held is None or not self.held.still():
            self.captured.clear()
            self.held = HeldFast(self.attachment.decoder)
        if self.held.hooked:
            return None
        size = rounded(columns)
        key = size, kinds(told_of(kwargs))
        if key not in self.captured:
            try:
                self.captured[key] = self._capture(cache, kwargs, size)
            except RuntimeError as error:
                if isinstance(error, KVPolicyError):
                    raise
                self.reason = capture_failure(error)
                self.captured.clear()
                return None
        return self.captured[key]

    def _capture(self, cache: KVPolicyCache, kwargs: dict[str, Any], size: int) -> CapturedForward:
        if self.pool is None:
            self.pool = new_pool()
        with self.compiled.whole(), torch.inference_mode(False), torch.no_grad():
            return CapturedForward(self.forward, cache, kwargs, size, self.pool)


def rounded(columns: int) -> int:
    """The next size that has graphs: up to 1024 each 64, beyond it eight between powers of two."""
    step = max(64, 1 << max((columns - 1).bit_length() - 4, 0))
    return -(-columns // step) * step


def why_not(attachment: Attached, decoder: nn.Module) -> str | None:
    """Why no forward of a decoder can be captured, None if nothing is known to be against it."""
    served, device = attachment.served, attachment.spec.device
    if device.type != "cuda":
        return f"the model is on {device}; only CUDA devices capture"
    if attachment.spec.devices or attachment.ranks.many:
        return "the model is on several devices"
    if not takes_positions(attachment.base) or served.probe.counts:
        return "its decoder counts positions by itself"
    if getattr(decoder.config, "quantization_config", None) is not None:
        return "what its layers round may depend on all columns"
    if "forward" in vars(decoder):
        return "its forward was replaced"
    if COLUMNS.keys().isdisjoint(inspect.signature(type(decoder).forward).parameters):
        return "its forward takes no ids"
    return None
