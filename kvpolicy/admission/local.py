"""Local attention: a sliding window and a few first tokens."""

from __future__ import annotations

import attrs
from torch import Tensor

from .._fields import not_negative, positive
from .._names import named
from ._base import Admission, Write


@named
@attrs.frozen(kw_only=True)
class LocalAttention(Admission):
    """Keeps the first `sinks` tokens and the last `window` tokens (StreamingLLM's set).

    Keys keep their true positions. `sinks=0` is a plain sliding window.
    """

    window: int = attrs.field(default=256, validator=positive)
    sinks: int = attrs.field(default=4, validator=not_negative)

    @property
    def by_position(self) -> bool:
        return True

    def admit(self, write: Write) -> Tensor:
        return (write.positions < self.sinks).expand(write.key.shape[0], -1)
