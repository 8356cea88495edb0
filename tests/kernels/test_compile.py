"""Every kernel compiles for every supported device, within its shared memory, without one."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import pytest

from tests.support.kernels.compiled import compiled
from tests.support.kernels.overlaps import PAIRS, check_overlaps

DIMS = ["64", "80", "128", "256", "512", "192x128"]


def run(configuration: str, cache: Path, *options: str) -> list[tuple[str, dict[str, int]]]:
    wanted = {
        "_add_levels",
        "_advance",
        "_amounts",
        "_append",
        "_arena_write",
        "_attend",
        "_attend_chosen",
        "_chunks",
        "_column_sums",
        "_columns",
        "_count_digits",
        "_decode_write",
        "_edges",
        "_find_columns",
        "_fold",
        "_fold_groups",
        "_heaviest",
        "_key_directions",
        "_key_dots",
        "_lag_spreads",
        "_levels",
        "_query_levels",
        "_mark",
        "_mark_whole",
        "_move_kept",
        "_norms",
        "_plan",
        "_read_tokens",
        "_recent",
        "_projected_norms",
        "_row_sums",
        "_split",
        "_store",
        "_stored",
        "_top_pages",
        "_write_minmax",
        "_write_number",
    }
    if "x" in configuration:  # rectangles want values of the keys' head_dim
        wanted.remove("_fold")
    if re.match("90:(64|128):.*float16", configuration):
        wanted.add("_attend_listed")
    found = compiled(configuration, cache, *options)
    assert wanted <= {name for name, _ in found}
    return found


def test_each_kernel_compiles(tmp_path: Path) -> None:
    """To Triton's IR, the kernels of decoding to the end."""
    found = run("90:128:64:bfloat16", tmp_path, "--once", "--whole", *PAIRS)
    assert check_overlaps(90, found) == PAIRS


# Every device and every head_dim in one of its dtypes; all of them by hand, which takes an hour:
# KVPOLICY_COMPILE=all python -m pytest -m slow tests/kernels/test_compile.py
ALL = list(itertools.product([80, 86, 89, 90, 100], DIMS, ["bfloat16", "float32"]))
SOME = [
    (80, "80", "bfloat16"),
    (86, "192x128", "bfloat16"),
    (89, "512", "bfloat16"),
    (90, "128", "bfloat16"),
    (90, "256", "bfloat16"),
    (100, "64", "float32"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "cc, dim, dtype", ALL if os.environ.get("KVPOLICY_COMPILE") == "all" else SOME
)
def test_compiles(cc: int, dim: str, dtype: str, tmp_path: Path) -> None:
    run(f"{cc}:{dim}:{64 if cc == 90 and dim == '128' else 16}:{dtype}", tmp_path)
