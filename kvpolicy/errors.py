"""The library's own errors; everything else raises ValueError or TypeError."""


class KVPolicyError(RuntimeError):
    """Base of the library's own errors."""


class CapacityError(KVPolicyError):
    """The cache would exceed a cap that was set on it; nothing was written.

    Attributes:
        row: the sequence that would exceed a cap of its own, `max_tokens`; None where it is one of
            all sequences, `max_bytes`.
    """

    def __init__(self, *args: object, row: int | None = None) -> None:
        super().__init__(*args)
        self.row = row


class RollbackError(KVPolicyError):
    """Tokens cannot be taken back: too many of them, or an eviction lies between."""


class PhaseError(KVPolicyError):
    """Calls came in an order that has no meaning, such as decoding before the prompt ended."""


class BackendError(KVPolicyError):
    """An explicitly chosen backend cannot run here; the library never falls back silently."""


class UnsupportedError(KVPolicyError):
    """A model, a layer or a generation mode that the library does not serve."""
