"""Shared settings: kernels run interpreted where there is no GPU, and fresh memory holds NaN."""

from __future__ import annotations

import os
import platform

# Interpreted products are numpy's, which torch imports. OpenBLAS has kernels, those for AVX2, that
# round a row of a product by its place in the matrix; these do not.
if platform.machine() in ("x86_64", "AMD64"):
    os.environ.setdefault("OPENBLAS_CORETYPE", "Sandybridge")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import pytest
from hypothesis import HealthCheck, settings

from tests.support import interpreter

settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("suite")
torch.set_num_threads(1)
interpreter.remember()

# torch remembers its constructors at the first use of a device context: now, before `poisoned`
# replaces some, or models meant for the meta device would take real memory.
with torch.device("meta"):
    torch.empty(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Makes warnings errors inside tests, except those of other plugins; a test's own marks win."""
    filters = ("error", "default:::pytest_", *config.getini("filterwarnings"))
    for item in items:
        item.add_marker(pytest.mark.filterwarnings(*filters), append=False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and friends give NaN, so that reading what nobody wrote shows."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _make=make, **k: fill(_make(*a, **k)))
