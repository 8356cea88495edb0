"""How policies decide, and the pairs in which every policy meets each way of deciding.

What works beside one policy of a kind should work beside the next: the fast suite takes these
pairs, the slow one every pair. Of what is dear the fast suite takes the first of these pairs.
"""

from __future__ import annotations

from tests.support.contract.cases import ADMISSIONS, EVICTIONS, SELECTIONS

# Not at all; by positions; by a number of each token; by queries; by statistics of queries; for
# several heads together; for tiles of a prompt.
KINDS = {
    "admission": {
        "neutral": ("all",),
        "position": ("local", "duo"),
        "number": ("random", "gate", "zap", "ada_ea", "any_of", "all_of", "per_layer"),
    },
    "selection": {
        "neutral": ("all",),
        "query": ("quest_each", "user"),
        "heads": ("quest", "quest_mean", "quest_first", "top_channels", "per_layer"),
        "tiles": ("xattention", "xattention_quest", "xattention_layers"),
    },
    "eviction": {
        "neutral": ("none",),
        "accumulated": ("h2o", "h2o_decode", "kvzip", "judge"),
        "position": ("at_end_local", "streaming"),
        "number": (
            "at_end",
            "at_end_gate",
            "per_layer",
            "per_layer_mixed",
            "knorm",
            "at_end_zap",
            "keydiff",
            "lagkv",
            "q_filters",
            "tri",
            "tri_end",
            "trim",
            "fast",
            "ranked",
        ),
        "query": (
            "tokens",
            "tokens_decode",
            "ratio",
            "pyramid",
            "per_layer_decode",
            "tova",
            "sage",
            "dbudget",
            "fastgen",
            "g_kv",
            "critical",
            "r_kv",
        ),
        "statistics": ("expected", "expected_decode", "critical_expected", "cap_kv"),
        "heads": (
            "adaptive",
            "adaptive_pyramid",
            "cap",
            "cap_decode",
            "tova_layer",
            "across_layers",
            "lazy_layers",
            "headkv",
            "lukv",
            "simlayer",
        ),
    },
}
for slot, table in (("admission", ADMISSIONS), ("selection", SELECTIONS), ("eviction", EVICTIONS)):
    missing = set(table) ^ {name for names in KINDS[slot].values() for name in names}
    assert not missing, f"the {slot} {missing} has no kind"


def meet(one: str, other: str) -> list[tuple[str, str]]:
    """Pairs of names in which every policy of either slot meets each kind of the other."""
    found: list[tuple[str, str]] = []
    ours, theirs = KINDS[one], KINDS[other]
    for number, name in enumerate(x for names in ours.values() for x in names):
        found += [(name, names[number % len(names)]) for names in theirs.values()]
    for number, name in enumerate(x for names in theirs.values() for x in names):
        met = {x for x, y in found if y == name}
        left = [names for names in ours.values() if not met & set(names)]
        found += [(names[number % len(names)], name) for names in left]
    return found


def first_met(one: str, other: str) -> list[tuple[str, str]]:
    """The pairs of `meet` in which a policy, or a kind beside a kind of the other, is new."""
    kinds = [
        {name: kind for kind, names in KINDS[x].items() for name in names} for x in (one, other)
    ]
    met: set[tuple[str, ...]] = set()
    found = []
    for pair in meet(one, other):
        new = {(slot, name) for slot, name in zip(("one", "other"), pair, strict=True)}
        new |= {tuple(of[name] for of, name in zip(kinds, pair, strict=True)) + ("kinds",)}
        if new - met:
            found.append(pair)
        met |= new
    return found
