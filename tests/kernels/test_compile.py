"""Every kernel compiles for every supported device, within its shared memory, without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kernels.compiled import compiled


def run(configuration: str, cache: Path, *options: str) -> None:
    wanted = {
        "_add_levels",
        "_advance",
        "_amounts",
        "_append",
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
        "_levels",
        "_query_levels",
        "_mark",
        "_mark_whole",
        "_move_kept",
        "_plan",
        "_read_tokens",
        "_recent",
        "_row_sums",
        "_split",
        "_store",
        "_stored",
        "_top_pages",
        "_write_number",
    }
    if "x" in configuration:  # rectangles want values of the keys' head_dim
        wanted.remove("_fold")
    assert wanted <= {name for name, _ in compiled(configuration, cache, *options)}


def test_each_kernel_compiles(tmp_path: Path) -> None:
    run("90:128:64:bfloat16", tmp_path, "--once")


@pytest.mark.slow
@pytest.mark.parametrize("cc", [80, 86, 89, 90, 100])
def test_compiles(cc: int, tmp_path: Path) -> None:
    run(f"{cc}:128:{64 if cc == 90 else 16}:bfloat16", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dim", [64, 80, 256, 512, "192x128"])
@pytest.mark.parametrize("cc", [80, 86, 89, 90, 100])
def test_compiles_elsewhere(cc: int, dim: int | str, dtype: str, tmp_path: Path) -> None:
    run(f"{cc}:{dim}:16:{dtype}", tmp_path)
