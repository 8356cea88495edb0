"""Ops of kvpolicy for a KV cache of one's own; their docstrings give shapes and units."""

from .ops import Bounds as Bounds
from .ops import Heads as Heads
from .ops import Pages as Pages
from .ops import Ring as Ring
from .ops import Segments as Segments
from .ops import paged_decode as paged_decode
from .ops import prefill_attention as prefill_attention
from .ops import write_gate as write_gate

__all__ = [
    "Bounds",
    "Heads",
    "Pages",
    "Ring",
    "Segments",
    "paged_decode",
    "prefill_attention",
    "write_gate",
]
