"""What a compiled kernel must contain to be fast, and would lose without a wrong result."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kernels.compiled import compiled

PAIRS = ["_split", "_reduce", "_quest_scores", "_top_pages"]


def check(cc: int, page: int, cache: Path, *options: str) -> list[str]:
    found = compiled(f"{cc}:128:{page}:bfloat16", cache, *options, "--only", *PAIRS)
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


@pytest.mark.parametrize(("cc", "page"), [pytest.param(80, 16, marks=pytest.mark.slow), (90, 64)])
def test_decode(cc: int, page: int, tmp_path: Path) -> None:
    assert check(cc, page, tmp_path, "--once") == PAIRS


@pytest.mark.slow
@pytest.mark.parametrize(("cc", "page"), [(80, 16), (90, 64)])
def test_decode_of_chosen_pages(cc: int, page: int, tmp_path: Path) -> None:
    assert check(cc, page, tmp_path) == PAIRS[:2] * 3 + PAIRS[2:] * 2 + PAIRS[:2]
