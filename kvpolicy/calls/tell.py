"""What a cache is told of the model's layers, for evictions that ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from torch import Tensor

from .._arguments import check_kind
from ..rope import Rope
from ..store.layer import LayerStore
from ..store.state import CacheState


class Known(TypedDict, total=False):
    """What `CachePipeline.tell` takes of a layer."""

    output_weight: Tensor | Callable[[], Tensor]
    rope: Rope | None


def tell(state: CacheState, layer: int, known: Known) -> None:
    """Keeps what is `known` of a layer; raises for what does not fit it, with nothing changed."""
    check_kind("layer", layer, int, f"one of {state.spec.layers} from 0")
    if not 0 <= layer < state.spec.layers:
        raise ValueError(f"layer: wanted one of {state.spec.layers} from 0, got {layer}")
    store = state.layers[layer]
    unknown = known.keys() - Known.__annotations__
    if unknown:
        raise TypeError(f"tell: wanted output_weight or rope, got {min(unknown)}")
    if "rope" in known:
        _check_rope(known["rope"], store)
    if "output_weight" in known:
        store.output_weight = _checked(known["output_weight"], store)
    if "rope" in known:
        store.rope, store.told_rope = known["rope"], True


def _check_rope(rope: Rope | None, store: LayerStore) -> None:
    if rope is None:
        return
    check_kind("rope", rope, Rope, "a Rope or None")
    turning = 2 * len(rope.frequencies)
    if turning > store.sizes.head_dim:
        raise ValueError(
            f"rope: wanted at most {store.sizes.head_dim // 2} frequencies, of heads with "
            f"{store.sizes.head_dim} channels, got {turning // 2}"
        )


def _checked(weight: Tensor | Callable[[], Tensor], store: LayerStore) -> Callable[[], Tensor]:
    """A function that gives the output projection, whose shape is checked when it does."""
    sizes = store.sizes

    def fits(found: Tensor) -> Tensor:
        wanted = f"floats [{sizes.heads}, {sizes.value_dim}, hidden] on {store.device}"
        check_kind("output_weight", found, Tensor, wanted)
        shaped = found.ndim == 3 and found.shape[:2] == (sizes.heads, sizes.value_dim)
        if not shaped or not found.is_floating_point() or found.device != store.device:
            got = f"{found.dtype} {list(found.shape)} on {found.device}"
            raise ValueError(f"output_weight: wanted {wanted}, got {got}")
        return found

    if isinstance(weight, Tensor):
        fits(weight)
        held = weight
        return lambda: held
    if not callable(weight):
        check_kind("output_weight", weight, Tensor, "a tensor [Hq, Dv, hidden] or a function")
    made = weight
    return lambda: fits(made())
