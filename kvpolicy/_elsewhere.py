"""Names that other libraries have for what is here under another: what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# By the name in small letters, without kvpress's "Press".
KNOWN = {
    "adakv": "SnapKV(budget=Adaptive(...))",
    "cap": "CapKV(budget=...)",
    "composed": "CachePipeline(...)",
    "compressionratiodecoding": 'SnapKV(budget=Ratio(...), when="decode")',
    "criticaladakv": "CriticalKV(SnapKV(budget=Adaptive(...)))",
    "decoding": 'SnapKV(budget=..., when="decode")',
    "dms": 'AtPromptEnd(KVzap.from_pretrained(path), generated="keep")',
    "dualcache": "CachePipeline(...)",
    "duo": "DuoAttention.from_pretrained(folder, sparsity=0.5)",
    "minference": "VerticalSlash(...)",
    "observedattention": "H2O(budget=...)",
    "perlayercompression": "per_layer(...)",
    "prefilldecoding": 'SnapKV(budget=..., when="decode")',
    "pyramidkv": "SnapKV(budget=Pyramid(...))",
    "qfilter": "QFilters.from_pretrained(repository, file, budget=...)",
    "random": 'AtPromptEnd(RandomGate(...), generated="keep")',
    "rocketkv": "CachePipeline(selection=TopChannels(...), eviction=SnapKV(...))",
    "wgkv": "WriteGate.from_pretrained(repository, file)",
}
# Methods that have no class here, unless the root has one by now.
METHODS = {"think"}
ABSENT = (
    "no policy of this name; docs/coming-from.md and docs/policies.md say what is here for it, "
    "docs/writing-a-policy.md how to write one"
)


def known_elsewhere(name: str, names: Sequence[str]) -> str | None:
    """The sentence about a name of another library, None for any other name."""
    press = name.endswith("Press") and name != "Press"
    plain = name.removesuffix("Press").lower()
    own = next((x for x in names if x.lower() == plain and not name.islower()), None)
    if instead := own or KNOWN.get(plain):
        return f"{name}: not its name in kvpolicy; write {instead}"
    return f"{name}: {ABSENT}" if press or plain in METHODS else None


def near(name: str, names: Sequence[str]) -> str:
    """What to write for a misspelt name, or ""."""
    found = difflib.get_close_matches(name, names, 1)
    return f"; write {found[0]}" if found else ""
