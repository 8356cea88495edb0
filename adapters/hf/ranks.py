"""The ranks of a tensor-parallel model: they feed the same tokens and fail together.

Every rank runs the same calls on its own heads. Inside a forward the model's layers exchange
activations; between forwards every exchange of ours is a vote, or begins with one, so that a rank
that failed anywhere meets the others in their next one. One process votes on nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import CapacityError, KVPolicyError, UnsupportedError
from .alarm import Alarm
from .modes import ordinary

Key = Tensor | int
_AGREED = "_kvpolicy_agreed"  # on an error that all ranks know of
_ODD, _BITS = 2654435761, (1 << 62) - 1


class Ranks:
    """The ranks along one axis of a device mesh, or with no mesh this process alone."""

    def __init__(self, mesh: Any = None, axis: int = 0) -> None:
        self.mesh, self.axis = mesh, axis
        self.left = False  # the others, by an error in a forward of the model's own code
        self.first: int | None = None  # rank that did
        self.quiet = False  # a step is being captured, in which nothing can be asked of the host
        self.stepping = False  # between captured steps, where nobody votes
        self.alarm: Alarm | None = None
        self.ballot: Tensor | None = None  # made once: there may be no memory when it is wanted

    @property
    def many(self) -> bool:
        return self.mesh is not None

    def key(self, inputs: Mapping[str, Any]) -> Tensor | int:
        """A number for what a forward is fed, the same on ranks that feed the same tokens to
        caches that have seen as many.
        """
        ids = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else None
        if not self.many or self.quiet or ids is None:
            return 1
        weights = torch.arange(1, ids.numel() + 1, device=ids.device) * _ODD
        seen = getattr(inputs.get("past_key_values"), "columns", 0) * _ODD
        found: Tensor = (((ids.flatten() + 1) * weights).sum() + seen) & _BITS | 1
        return found

    @ordinary
    def vote(self, error: BaseException | None = None, key: Tensor | int = 0) -> None:
        """Raises on every rank if one has an `error`, its own where it has one.

        Raises UnsupportedError if ranks do different things: `key` is what this one does next.
        """
        try:
            if not self.many or self.quiet:
                if error is not None:
                    raise error
                return
            if self.stepping and error is not None:
                self.leave(error)
            if getattr(error, _AGREED, False):
                assert error is not None
                raise error
            if self.left:
                raise self._gone() from error
            highest, most, least = self._highest(self._code(error), key)
            if not highest and most == -least:
                return
            if error is None and highest:
                error = _of_another(highest)
            elif error is None:
                error = UnsupportedError(
                    "input_ids: the ranks of a tensor-parallel model feed different tokens, or one "
                    "stopped before the others; give all the same inputs and options, and the "
                    "token that rank 0 samples in a loop of your own"
                )
            raise _agreed(error)
        finally:
            del error  # else its traceback, which holds caches, would hold itself

    def step(self, own: Tensor, error: BaseException | None) -> Tensor:
        """Rank 0's `own` `[n]`, numbers from 0, and the code of a rank's `error`, `[n + 1]` int64.

        The host does not wait: it reads the code when it looks, and `raise_told` says what it
        means.
        """
        told = torch.full((len(own) + 1,), -1, dtype=torch.int64, device=self.mesh.device_type)
        if self.rank == 0:
            told[:-1] = own
        told[-1] = self._code(error)
        with self._meeting():
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
        return told

    def raise_told(self, code: int, error: BaseException | None) -> None:
        """Raises, on every rank alike, where the code of a step is no 0."""
        try:
            if code:
                self.stepping = False
                raise _agreed(_of_another(code) if error is None else error)
        finally:
            del error

    def stay(self) -> None:
        """Before a captured step, which must not run when the ranks' way to each other is gone."""
        self.stepping = self.many
        if self.left:
            raise self._gone()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Asks nothing inside."""
        self.quiet = True
        try:
            yield
        finally:
            self.quiet = False

    @contextlib.contextmanager
    def voting(self) -> Iterator[None]:
        """Votes inside although captured steps run."""
        before, self.stepping = self.stepping, False
        yield
        self.stepping = before

    @contextlib.contextmanager
    def together(self, key: Key | Callable[[], Key] = 0) -> Iterator[None]:
        """Votes after what it holds, which exchanges nothing itself but by votes.

        A `key` that is called is so before; where it fails, what it holds does not run.
        """
        error: BaseException | None = None
        try:
            found = key() if callable(key) else key
        except BaseException as raised:
            self.vote(raised)
            raise
        try:
            yield
        except BaseException as raised:
            if not self.many:
                raise
            error = raised
        try:
            self.vote(error, found)
        finally:
            del error

    def numbers(self, own: Sequence[int]) -> list[list[int]]:
        """What each rank says `[parts][n]`; raises where one failed before it came here."""
        if not self.many:
            return [list(own)]
        with self.together(1 + len(own)):
            told = torch.tensor(own, dtype=torch.int64, device=self.mesh.device_type)
            into = self._room(told)
        found: list[list[int]] = torch.stack(self._gathered(told, into)).tolist()
        return found

    def heads(self, x: Tensor) -> Tensor:
        """`x` `[B, H, ...]` of this rank's heads, of all heads; raises as `numbers` does."""
        if not self.many:
            return x
        with self.together(_key(x.shape)):
            x = x.contiguous()
            into = self._room(x)
        return torch.cat(self._gathered(x, into), 1)

    def objects(self, own: Any) -> list[Any]:
        """What each rank gives, of plain values; raises as `numbers` does."""
        if not self.many:
            return [own]
        self.vote()
        found: list[Any] = [None] * self.parts
        with self._meeting():
            dist.all_gather_object(found, own, group=self.group)
        return found

    def same(self, x: Tensor) -> Tensor:
        """Rank 0's `x`, for all."""
        if self.many:
            self.vote()
            with self._meeting():
                dist.broadcast(x, group=self.group, group_src=0)
        return x

    @contextlib.contextmanager
    def one_seed(self, device: torch.device) -> Iterator[None]:
        """Lets all ranks draw the same numbers, from a seed that rank 0 draws."""
        if not self.many:
            yield
            return
        seed = self.same(torch.randint(_BITS, (1,)).to(device))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(seed))
            yield

    def leave(self, error: BaseException) -> None:
        """Says that `error` broke a forward off, in whose exchanges the others wait.

        They stop waiting, and neither this rank nor they exchange anything from then on. `error` is
        raised here as it is, unless it says no more than that another rank was first.
        """
        if not self.many or getattr(error, _AGREED, False) or self.left:
            return
        self.left, own = True, self.rank
        self.first = None if _lost(error) else own
        if self.alarm is not None:
            if self.first == own:
                self.alarm.ring(own)
            self.first = self.alarm.rung()
            self.alarm.release(self.mesh, self.axis)
        if self.first == own:
            _agreed(error)

    def listen(self) -> None:
        """From now on another rank that breaks off ends this one's waits."""
        if self.many and self.alarm is None:
            self.alarm = Alarm(self.mesh, self.axis)
            self.alarm.listen(self.rank, self._broken)

    def _broken(self) -> None:
        """Another rank broke off while this one may be waiting in a kernel."""
        assert self.alarm is not None
        self.left, self.first = True, self.alarm.rung()
        self.alarm.release(self.mesh, self.axis)

    @property
    def parts(self) -> int:
        """How many ranks share the heads."""
        return int(self.mesh.size(self.axis)) if self.many else 1

    @property
    def part(self) -> int:
        """This rank's place among them."""
        return self.rank if self.many else 0

    @property
    def exchange(self) -> Ranks | None:
        """These ranks as a cache's way to the other heads, None for a process alone."""
        return self if self.many else None

    @property
    def rank(self) -> int:
        found: int = self.mesh.get_local_rank(self.axis)
        return found

    @property
    def group(self) -> Any:
        return self.mesh.get_group(self.axis)

    def _room(self, x: Tensor) -> list[Tensor]:
        """For what each rank gives; made where a rank without memory can still say so."""
        return [torch.empty_like(x) for _ in range(self.parts)]

    def _gathered(self, x: Tensor, into: list[Tensor]) -> list[Tensor]:
        with self._meeting():
            dist.all_gather(into, x, group=self.group)
        return into

    def _code(self, error: BaseException | None) -> int:
        return 0 if error is None else 2 * self.rank + 1 + isinstance(error, CapacityError)

    def _highest(self, code: int, key: Tensor | int) -> tuple[int, int, int]:
        """The highest code of any rank, the highest key and the highest -key."""
        if self.ballot is None:
            self.ballot = torch.zeros(3, dtype=torch.int64, device=self.mesh.device_type)
        self.ballot[0], self.ballot[1], self.ballot[2] = code, key, -key
        with self._meeting():
            dist.all_reduce(self.ballot, dist.ReduceOp.MAX, group=self.group)
            highest, most, least = self.ballot.tolist()
        return highest, most, least

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        """Raises, of an exchange that cannot be completed, that this rank is alone."""
        try:
            yield
        except Exception as error:
            self.leave(error)
            raise self._gone() from error
        if self.left:  # while it waited: what it got is nothing
            raise self._gone()

    def _gone(self) -> BaseException:
        """What a rank says that no exchange reaches any more."""
        who = "a rank" if self.first is None else f"rank {self.first}"
        how = "is gone" if self.first is None else "broke off inside a forward"
        return _agreed(
            KVPolicyError(
                f"{who} of the tensor-parallel model {how}, so that its ranks are no longer in "
                "step; its own error says why: end all processes, and start anew"
            )
        )


def _key(shape: Sequence[int]) -> int:
    """A number for a shape, another for most others."""
    found = len(shape)
    for n in shape:
        found = (found * 1_000_003 + n) & _BITS
    return found


def _lost(error: BaseException) -> bool:
    """Whether an error says that an exchange could not be completed."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _agreed(error: BaseException) -> BaseException:
    setattr(error, _AGREED, True)
    return error


def _of_another(code: int) -> KVPolicyError:
    rank, full = divmod(code - 1, 2)
    what = f"rank {rank} of the tensor-parallel model failed, so that this call ends on all ranks"
    if full:
        return CapacityError(f"{what}: it has no room for the call; its own error says more")
    return KVPolicyError(f"{what}; its own error says why")
