"""What a compiled kernel must contain to be fast, and would lose without a wrong result."""

from __future__ import annotations

PAIRS = ["_split", "_reduce", "_quest_scores", "_top_pages"]


def check_overlaps(cc: int, launches: list[tuple[str, dict[str, int]]]) -> list[str]:
    """Which kernels of `PAIRS` are among launches compiled for head_dim 128 in bfloat16."""
    found = [(name, counts) for name, counts in launches if name in PAIRS]
    overlaps = cc >= 90
    for name, counts in found:
        first = name in ("_split", "_quest_scores")
        # Only the second kernel of a pair is launched early, so only that may and must wait.
        assert counts["waits"] == (overlaps and not first)
        assert counts["triggers"] == (overlaps and first)
        if name == "_split":
            # Keys and values of two blocks before each of the two loops and of one inside, 16
            # bytes a copy, while those of the last block are still on their way.
            assert counts["copies"] == 2 * 3 * 2 * (64 * 128 * 2) // (128 * 16)
            assert counts["in_flight"] == 2
    return [name for name, _ in found]
