"""Finds how the keys of a layer before RoPE are had, by what rotates to the key that was cached."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .pre_rope import Angles, angles_of, rotated_back
from .records import PreRope, Rotation
from .watched import Watched


def find(seen: Watched, query: Tensor, key: Tensor, *, clips: bool = False) -> PreRope | str:
    """How to get the keys before RoPE, or why there is no way.

    `key` `[B, Hkv, S, D]` is what the layer cached in the forward that `seen` saw, `query`
    `[B, Hq, S, D]` what it attended with. The prompt must be long enough to tell rotations apart.
    With `clips` the model bounds what its submodules put out, so that none of it is exact.
    """
    search = Search(seen, key)
    found = search.direct(key) or search.normed_afterwards(key) or search.fused(key)
    if found is None:
        # The same rotation as the queries', which is checked on these.
        by_query = Search(seen, query)
        of_query = by_query.direct(query) or by_query.fused(query)
        if of_query is not None and not search.producers(key):
            found = of_query
            clips = True
    if found is not None and found.form == "module" and clips:
        found = PreRope(form="rotate_back", rotation=found.rotation)
    if found is None:
        return "no submodule's output gives the cached key when it is rotated by the layer's RoPE"
    if found.form == "rotate_back" and found.rotation is not None and search.axes:
        return "its RoPE has several axes, and no submodule puts its keys out"
    return found


def _tensors(output: Any) -> list[tuple[int | None, Any]]:
    """The tensors that a submodule puts out, with their places where there are several."""
    return list(enumerate(output)) if isinstance(output, tuple) else [(None, output)]


def _clipped(x: Tensor, like: Tensor) -> Tensor:
    """`x` within the bounds of `like`, as by a model's `clip_qkv`."""
    bound = float(like.abs().max())
    return x.clamp(-bound, bound)


class Search:
    """What may lie before a tensor that a layer attends with, `like` `[B, H, S, D]`."""

    def __init__(self, seen: Watched, like: Tensor) -> None:
        self.seen, self.shape = seen, like.shape
        self.tolerance = 16 * torch.finfo(like.dtype).eps
        self.axes = False
        # The nearest submodules first: inner ones are parts of them.
        names = sorted(seen.outputs, key=lambda name: name.count("."))
        self.candidates = [
            (name, element, first, x)
            for name in names
            for element, output in _tensors(seen.outputs[name][0])
            for first, x in self._as_heads(output)
        ]
        self.angles = list(self._angles())

    def direct(self, target: Tensor) -> PreRope | None:
        """A submodule whose output has the shape of `target`."""
        backs = self._backs(target)
        for name, element, first, x in self.candidates:
            for rotation, back in backs:
                if self._near(x, back):
                    return self._module(name, rotation, heads_first=first, element=element)
                if self._near(_clipped(x, back), back):
                    return PreRope(form="rotate_back", rotation=rotation)
        for name, _, _, x in self.candidates:
            if self._near(x, target) and self._unrotated(name):
                return PreRope(form="same")
        return None

    def normed_afterwards(self, target: Tensor) -> PreRope | None:
        """The same where a submodule made `target` out of what RoPE gave."""
        for name in self.producers(target):
            for _, x in self._as_heads(self.seen.outputs[name][1]):
                found = self.direct(x) or self.fused(x)
                if found is not None and found.form == "module":
                    return found
        return None

    def producers(self, target: Tensor) -> list[str]:
        """Submodules whose output is `target` and whose input has its size."""
        return [
            name
            for name, _, _, x in self.candidates
            if self._near(x, target)
            and isinstance(self.seen.outputs[name][1], Tensor)
            and self.seen.outputs[name][1].numel() == target.numel()
        ]

    def fused(self, target: Tensor) -> PreRope | None:
        """A part of the output of a submodule that makes more than the keys."""
        batch, _, columns, dim = self.shape
        backs = self._backs(target)
        for name, (output, _) in self.seen.outputs.items():
            size = batch * columns
            if not isinstance(output, Tensor) or not output.is_floating_point():
                continue
            if output.numel() <= target.numel() or output.numel() % (size * dim):
                continue
            if output.shape[0] not in (batch, size):
                continue
            blocks = output.reshape(batch, columns, -1, dim).transpose(1, 2).double()
            for rotation, back in backs:
                if layout := self._layout(blocks, back):
                    offset, stride = (dim * step for step in layout)
                    return self._module(name, rotation, offset=offset, stride=stride)
                if self._layout(_clipped(blocks, back), back):
                    return PreRope(form="rotate_back", rotation=rotation)
            if self._layout(blocks, target.double()):
                return PreRope(form="same")
        return None

    def _layout(self, blocks: Tensor, target: Tensor) -> tuple[int, int] | None:
        """The first block of `blocks` `[B, N, S, D]` that is a head of `target`, and the step."""
        size = self.tolerance * target.abs().max()
        found = []
        for head in range(target.shape[1]):
            far = (blocks - target[:, head : head + 1]).abs().amax((0, 2, 3))
            at = (far <= size).nonzero()
            if not len(at):
                return None
            found.append(int(at[0]))
        steps = {b - a for a, b in itertools.pairwise(found)} or {1}
        return (found[0], steps.pop()) if len(steps) == 1 else None

    def _module(
        self,
        name: str,
        rotation: Rotation,
        *,
        offset: int = 0,
        stride: int = 0,
        heads_first: bool = False,
        element: int | None = None,
    ) -> PreRope:
        return PreRope(
            form="module",
            module=name,
            element=element,
            offset=offset,
            stride=stride or self.shape[-1],
            heads_first=heads_first,
            rotation=rotation,
        )

    def _unrotated(self, name: str) -> bool:
        """Whether no RoPE can lie before the submodule: it projects, or norms a projection."""
        given = self.seen.outputs[name][1]
        if not isinstance(given, Tensor):
            return False
        hidden = next((x for x in self.seen.arguments.values() if isinstance(x, Tensor)), None)
        if given is hidden or given.numel() != torch.Size(self.shape).numel():
            return True
        inputs = self._as_heads(given)
        others = [(other, x) for other, _, _, x in self.candidates if other != name]
        return any(
            self._near(x, entering) and self._unrotated(other)
            for _, entering in inputs
            for other, x in others
        )

    def _as_heads(self, output: Any) -> list[tuple[bool, Tensor]]:
        """`output` as heads `[B, H, S, D]` where it has their size, and whether it lay so."""
        batch, heads, columns, dim = self.shape
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return []
        if output.numel() != torch.Size(self.shape).numel():
            return []
        found = [(True, output.double())] if output.shape == self.shape else []
        if output.shape[0] in (batch, batch * columns) and (columns in output.shape[:2]):
            found.append(
                (False, output.reshape(batch, columns, heads, dim).transpose(1, 2).double())
            )
        return found

    def _angles(self) -> Iterator[tuple[str, str, Angles]]:
        """cos and sin, with the keyword or the submodule that they come from."""
        held = [(name, "", value) for name, value in self.seen.arguments.items()]
        held += [("", name, value) for name, (value, _) in self.seen.outputs.items()]
        for keyword, module, value in held:
            if isinstance(value, Tensor):
                fits = value.is_complex()
            else:
                fits = (
                    isinstance(value, (tuple, list))
                    and len(value) == 2
                    and all(isinstance(x, Tensor) and x.is_floating_point() for x in value)
                    and value[0].shape == value[1].shape
                )
            if not fits:
                continue
            cos, sin = angles_of(value)
            if cos.ndim == 4 and 1 not in cos.shape[1:3] and bool((cos == cos[:1]).all()):
                self.axes, cos, sin = True, cos[0], sin[0]
            if self.shape[2] in cos.shape and cos.ndim in (2, 3, 4):
                yield keyword, module, (cos.double(), sin.double())

    def _rotations(self) -> Iterator[Rotation]:
        dim = self.shape[-1]
        for keyword, module, (cos, _) in self.angles:
            width = cos.shape[-1]
            flags = itertools.product((False, True), repeat=2)
            for (interleaved, repeated), sign in itertools.product(flags, (1, -1)):
                for channels in (width, 2 * width):
                    if channels > dim or channels % 2 or (repeated and channels != width):
                        continue
                    for tail in (False, True)[: 1 + (channels < dim)]:
                        yield Rotation(
                            keyword=keyword,
                            module=module,
                            channels=channels,
                            interleaved=interleaved,
                            repeated=repeated,
                            sign=sign,
                            tail=tail,
                        )

    def _backs(self, target: Tensor) -> list[tuple[Rotation, Tensor]]:
        """`target` rotated back in every way that a layer may have rotated it."""
        sources = {(keyword, module): angles for keyword, module, angles in self.angles}
        return [
            (r, rotated_back(r, target.double(), sources[r.keyword, r.module]))
            for r in self._rotations()
        ]

    def _near(self, x: Tensor, target: Tensor) -> bool:
        far = (x.double() - target.double()).abs().max()
        return bool(far <= self.tolerance * target.double().abs().max())
