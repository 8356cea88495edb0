"""Which model types are served, found out on a tiny model of each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs

from ....errors import UnsupportedError
from ....pipeline import CachePipeline
from ..attach import attach
from .kinds import LayerKind, layer_kinds
from .probe import check_kinds
from .records import ModelRefused, Probe
from .steps import NOT_CHECKED, captured, compiled
from .tiny import default_config, tiny_config, tiny_model

MEMORY = 12 << 30  # bytes of address space that checking a type may take


@attrs.frozen(kw_only=True)
class Support:
    """What is known of one model type.

    Attributes:
        name: the `model_type`.
        served: whether a pipeline attaches; None where no verdict was reached.
        layers: its kinds of layers, with how many of each its default config has.
        policies: the layers on which policies act.
        attention: what its attention has besides queries, keys and values.
        pre_rope: how the keys before RoPE are had.
        check: that it failed.
        captured: whether decode steps are, or what prevents it; "not checked" without a GPU.
        compiled: whether a layer is traced as one graph, or what prevents it.
        reason: why it is refused, or no verdict was reached.
    """

    name: str
    served: bool | None
    layers: str = ""
    policies: str = ""
    attention: str = ""
    pre_rope: str = ""
    check: str = ""
    captured: str = NOT_CHECKED
    compiled: str = NOT_CHECKED
    reason: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """A line of the document's table, for a served type."""
        return (
            f"`{self.name}`",
            self.layers,
            self.policies,
            self.attention,
            self.pre_rope,
            self.captured,
            self.compiled,
        )


def check_type(name: str) -> Support:
    """Attaches a pipeline to a tiny random model of the type `name`."""
    try:
        check_kinds(tiny_config(name))
        model = tiny_model(name)
    except ModelRefused as error:
        return Support(name=name, served=False, check=error.check, reason=_reason(error))
    except Exception as error:  # a type may need a package, or fail in its own code
        return Support(name=name, served=None, reason=_unbuilt(error))
    try:
        with attach(model, CachePipeline()) as attached:
            found, aside = attached.served.probe, attached.put_aside is not None
    except ModelRefused as error:
        return Support(name=name, served=False, check=error.check, reason=_reason(error))
    except UnsupportedError as error:
        return Support(name=name, served=False, check="config", reason=str(error))
    kinds = _default_kinds(name, found.kinds)
    return Support(
        name=name,
        served=True,
        layers=_layers(kinds),
        policies=_policies(kinds),
        attention=_attention(found, aside),
        pre_rope=_pre_rope(found),
        compiled=_tried(compiled, model),
        captured=_tried(captured, model),
    )


def _tried(check: Callable[[Any], str], model: Any) -> str:
    """What `check` says of a served model, whose plain generate may need more than ids."""
    try:
        return check(model)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{NOT_CHECKED}: {type(error).__name__}: {' '.join(lines[0].split())[:160]}"


def check_types(
    names: Sequence[str],
    *,
    jobs: int = 1,
    seconds: float = 120.0,
    told: Callable[[Support], None] = lambda support: None,
) -> list[Support]:
    """`check_type` of each name in a process of its own, `jobs` at a time, in order of `names`.

    A type that crashes or takes more than `seconds` gets no verdict. `told` hears of each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def one(name: str) -> Support:
        found = _in_process(context, name, seconds)
        told(found)
        return found

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, names))


def _in_process(context: Any, name: str, seconds: float) -> Support:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            found: Support = ours.recv()
            return found
        return Support(name=name, served=None, reason=f"no answer within {seconds:g} s")
    except EOFError:
        process.join()
        return Support(name=name, served=None, reason=f"it ended with exit code {process.exitcode}")
    finally:
        ours.close()
        process.kill()
        process.join()


def _child(name: str, pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):  # of systems without limits
        import resource

        if not torch.cuda.is_available():  # whose driver takes address space as it likes
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["HF_HUB_OFFLINE"] = "1"
    pipe.send(check_type(name))


def _unbuilt(error: Exception) -> str:
    """Why there is no tiny model: the packages that it needs, where `error` is of missing ones."""
    said = " ".join(str(error).split())
    if isinstance(error, ImportError):
        # transformers names packages of its own checks in sentences only.
        packages = [error.name] if error.name else re.findall(r"requires the (\S+) library", said)
        if packages:
            verb = "is" if len(packages) == 1 else "are"
            return f"needs {' and '.join(packages)}, which {verb} not installed"
    return f"no tiny model: {type(error).__name__}: {said}"


def _reason(error: ModelRefused) -> str:
    where = ", ".join(x for x in (error.module, error.place) if x)
    return " ".join(error.reason.split()) + (f" ({where})" if where else "")


def _default_kinds(name: str, tiny: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
    """Of the type's own default config, which tells how many layers are of each kind.

    Those of the tiny one where a default config lacks kinds that the type can have.
    """
    try:
        kinds = layer_kinds(default_config(name))
    except Exception:  # some types have no default that says so
        return tiny
    return kinds if {x.kind for x in tiny} <= {x.kind for x in kinds} else tiny


def _counted(kinds: Iterable[LayerKind]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for kind in kinds:
        word = "hybrid sliding" if kind.kind == "hybrid" and kind.window else kind.kind
        counts[word] = counts.get(word, 0) + 1
    return counts


def _layers(kinds: Iterable[LayerKind]) -> str:
    return ", ".join(f"{count} {word}" for word, count in _counted(kinds).items())


def _policies(kinds: tuple[LayerKind, ...]) -> str:
    acting = sum(kind.attention and not (kind.window or kind.chunk) for kind in kinds)
    if not acting:
        return "none: no layer sees all keys"
    return "all layers" if acting == len(kinds) else f"{acting} of {len(kinds)} layers"


def _attention(found: Probe, aside: bool) -> str:
    layers = found.layers
    said = [
        ("sinks", any(layer.sinks_keyword for layer in layers)),
        ("softcap", any(layer.softcap is not None for layer in layers)),
        ("chunks", any(layer.chunk is not None for layer in layers)),
        ("shared keys", any(layer.shared for layer in layers)),
        ("values of another size", any(x.value_dim != x.head_dim for x in layers)),
        ("layers of several sizes", len({(x.kv_heads, x.head_dim) for x in layers}) > 1),
        ("no padded rows", not found.hides),
        ("no chunks after the first", not found.goes_on),
        ("positions after that of padding", bool(found.first)),
        ("caches not past a change of RoPE", aside),
    ]
    return ", ".join(word for word, holds in said if holds)


def _pre_rope(found: Probe) -> str:
    words = {"module": "exact", "same": "no RoPE", "rotate_back": "rotated back"}
    forms = [words[x.pre_rope.form] if x.pre_rope else "none" for x in found.stored]
    return ", ".join(sorted(set(forms), key=forms.index))
