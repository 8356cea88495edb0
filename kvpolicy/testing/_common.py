"""What the three checks share: the error, comparisons, and properties of any policy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._arguments import check_dtype, check_flag, optional
from .._fields import check_int, shown
from ..admission import Admission
from ..eviction import Eviction
from ..selection import Selection

MOST_SIZE = 1 << 16  # of anything in a check, which runs on the CPU
KINDS = {"admission": Admission, "selection": Selection, "eviction": Eviction}


class ConformanceError(AssertionError):
    """A policy breaks a property of its contract.

    `rule` is the property's name and `policy` the policy; the message also says what was wanted
    and what came.
    """

    def __init__(self, rule: str, policy: object, wanted: str, got: str) -> None:
        super().__init__(f"{type(policy).__name__} breaks '{rule}': wanted {wanted}, got {got}")
        self.rule, self.policy = rule, policy


def require(holds: bool, rule: str, policy: object, wanted: str, got: str) -> None:
    """Raises ConformanceError unless `holds`."""
    if not holds:
        raise ConformanceError(rule, policy, wanted, got)


def check_options(dtype: object, takes_effect: object, seed: object, **sizes: object) -> None:
    """The arguments of a check make sense."""
    for name, value in sizes.items():
        check_int(name, value, 1, MOST_SIZE)
    check_dtype("dtype", dtype)
    optional(check_flag, "takes_effect", takes_effect)
    check_int("seed", seed, 0)


def check_value(policy: object, kind: type) -> None:
    """The policy is of its slot's class, frozen, hashable and comparable."""
    if not isinstance(policy, kind):
        hint = ""
        if isinstance(policy, type) and issubclass(policy, kind):
            hint = f"; write {policy.__name__}(...)"
        other = next((x for x in KINDS if isinstance(policy, KINDS[x])), None)
        hint = f"; write check_{other}(policy)" if other else hint
        raise TypeError(f"policy: wanted {kind.__name__}, got {shown(policy)}{hint}")
    try:
        policy.conformance_probe = None  # type: ignore[attr-defined]
    except AttributeError:
        pass
    else:
        del policy.conformance_probe  # type: ignore[attr-defined]
        wanted = "a value whose attributes cannot be set (attrs.frozen)"
        raise ConformanceError("frozen", policy, wanted, "an attribute that was set")
    try:
        hash(policy)
        bool(policy == copy.deepcopy(policy))
    except (TypeError, RuntimeError) as error:
        wanted = "hash and == to work (tensor fields: eq=False)"
        raise ConformanceError("comparable", policy, wanted, f"{error}") from error


def run(policy: object, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a policy's method; its errors become 'runs', its writes 'inputs unchanged'."""
    inputs = _tensors(args)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    try:
        result = function(*args)
    except ConformanceError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise ConformanceError("runs", policy, f"{function.__name__} to return", got) from error
    for name, tensor in inputs.items():
        if not torch.equal(_bits(tensor), _bits(before[name])):
            wanted = f"{function.__name__} to leave its arguments alone"
            raise ConformanceError("inputs unchanged", policy, wanted, f"a changed {name}")
    return result


def _tensors(args: tuple[Any, ...]) -> dict[str, Tensor]:
    found = {}
    for place, arg in enumerate(args):
        if isinstance(arg, Tensor):
            found[f"argument {place}"] = arg
        for name, value in getattr(arg, "_asdict", dict)().items():
            if isinstance(value, Tensor):
                found[name] = value
    return found


def _bits(tensor: Tensor) -> Tensor:
    """Comparable even where a tensor holds NaN."""
    if not tensor.is_floating_point():
        return tensor
    return torch.stack([tensor.nan_to_num(), tensor.isnan().to(tensor.dtype)])


def check_tensor(policy: object, result: Any, name: str, shape: tuple[int, ...], like: Tensor,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
    """`result` is a tensor of this shape on `like`'s device, of `dtype` or else of floats."""
    if not isinstance(result, Tensor):
        raise ConformanceError("shape", policy, f"a tensor from {name}", type(result).__name__)
    wanted = f"{list(shape)} from {name}"
    require(tuple(result.shape) == shape, "shape", policy, wanted, f"{list(result.shape)}")
    fits = result.dtype == dtype if dtype is not None else result.dtype.is_floating_point
    wanted = f"{dtype or 'floats'} from {name}"
    require(fits, "dtype", policy, wanted, f"{result.dtype}")
    wanted = f"{like.device} from {name}"
    require(result.device == like.device, "device", policy, wanted, f"{result.device}")


def check_equal(rule: str, policy: object, result: Tensor, wanted: Tensor, case: str) -> None:
    """Two results are equal; floats up to rounding."""
    if result.dtype.is_floating_point:
        finite = wanted.masked_fill(~wanted.isfinite(), 0.0).abs()
        size = max(1.0, float(finite.max())) if finite.numel() else 1.0
        slack = 256 * torch.finfo(wanted.dtype).eps * size
        differ = ~torch.isclose(result, wanted, rtol=0.0, atol=slack, equal_nan=True)
    else:
        differ = result != wanted
    if differ.any():
        at = tuple(differ.nonzero()[0].tolist())
        raise ConformanceError(
            rule,
            policy,
            f"{wanted[at].item()} at {list(at)} {case}",
            f"{result[at].item()} ({int(differ.sum())} of {differ.numel()} differ)",
        )
