"""Decode kernels copy ahead and overlap; `test_each_kernel_compiles` sees it for the newest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kernels.compiled import compiled
from tests.support.kernels.overlaps import PAIRS, check_overlaps

pytestmark = pytest.mark.slow


def check(cc: int, page: int, cache: Path, *options: str) -> list[str]:
    found = compiled(f"{cc}:128:{page}:bfloat16", cache, *options, "--only", *PAIRS)
    return check_overlaps(cc, found)


def test_decode(tmp_path: Path) -> None:
    assert check(80, 16, tmp_path, "--once") == PAIRS


@pytest.mark.parametrize(("cc", "page"), [(80, 16), (90, 64)])
def test_decode_of_chosen_pages(cc: int, page: int, tmp_path: Path) -> None:
    assert check(cc, page, tmp_path) == PAIRS[:2] * 3 + PAIRS[2:] * 2 + PAIRS[:2]
