"""The page of model types: which are served and how, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from ...._markdown import table
from .support import Support
from .tiny import causal_types

HEADS = (
    "type",
    "layers",
    "policies act on",
    "attention",
    "keys before RoPE",
    "captured",
    "compiled",
)
_INTRODUCTION = """\
Made by `kvpolicy models --check --out docs/models.md`; do not edit.

A model is served if it keeps the contract of a cache, which `attach` checks once for each
configuration: a prompt and a decode step on the model itself, with handles in place of the cached
keys and values, beside the model's own attention. This table is what the same check says of a tiny
random model of every causal type of transformers {version}: {served} of {total} are served.

- **layers**: of the type's default config. Policies act on full ones; sliding and chunked ones
  keep a ring, linear, convolutional and hybrid ones transformers' own state, shared ones read the
  keys of another layer.
- **keys before RoPE**, which write gates read: *exact*, from a submodule whose output, rotated, was
  the key that the model cached; *rotated back* by the model's own cos and sin; *no RoPE*, the key
  itself.
- **captured**: whether `generate` replays decode steps as a CUDA graph, with the tokens of plain
  `generate`; **compiled**: whether dynamo traces a layer as one graph (`attach(compile=True)`), the
  same way. Else what prevents it; *not checked*, for captured, without a GPU.
- **check**, of refused types: *kinds* of layers by the config; *handle*, the model computes on its
  cached keys; *updates*, each layer caches keys once a forward and reads them; *arguments* of the
  attention function; *mask*, what a query sees; *attention*, the result of each call; *logits*;
  *forward*, it fails; *config*, it asks for what no cache holds."""

_MULTIMODAL = """\
Other types that generate text from images and text, by their text decoders. {served} of {total} are
served. Text alone is checked; where tokens of an image see each other, a forward with an image is
refused."""


def document(found: Sequence[Support]) -> str:
    """Markdown of what was found: served types first, by name, then why the others are not."""
    causal = set(causal_types())
    text = [x for x in found if x.name in causal]
    multimodal = [x for x in found if x.name not in causal]
    said = {
        "version": transformers.__version__,
        "served": sum(bool(x.served) for x in text),
        "total": len(text),
    }
    lines = ["# Models", "", _INTRODUCTION.format(**said), "", "## Causal language models"]
    lines += _tables(text)
    if multimodal:
        count = sum(bool(x.served) for x in multimodal)
        said = {"served": count, "total": len(multimodal)}
        lines += ["", "## Multimodal", "", _MULTIMODAL.format(**said), *_tables(multimodal)]
    return "\n".join(lines)


def _tables(found: Sequence[Support]) -> list[str]:
    ordered = sorted(found, key=lambda x: x.name)
    served = table(HEADS, [x.cells for x in ordered if x.served])
    others = table(("type", "check", "why not"), [_refusal(x) for x in ordered if not x.served])
    return ["", "### Served", "", *served, "", "### Refused, or without a verdict", "", *others]


def _refusal(support: Support) -> tuple[str, str, str]:
    return f"`{support.name}`", support.check or "no verdict", support.reason
