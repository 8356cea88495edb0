"""The library's own errors; everything else raises ValueError or TypeError."""


class KVPolicyError(RuntimeError):
    """Base of the library's own errors."""


class CapacityError(KVPolicyError):
    """The cache would exceed a cap that was set on it; nothing was written."""


class RollbackError(KVPolicyError):
    """Tokens cannot be taken back: too many of them, or an eviction lies between."""


class PhaseError(KVPolicyError):
    """Calls came in an order that has no meaning, such as decoding before the prompt ended."""


class BackendError(KVPolicyError):
    """An explicitly chosen backend cannot run here; the library never falls back silently."""


class UnsupportedError(KVPolicyError):
    """A model, a layer or a generation mode that the library does not serve."""
