"""What needs a GPU is collected whole where there is one, and counted where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.support.on_gpu import on_gpu


@pytest.mark.parametrize("there", [True, False])
def test_cases_for_a_gpu(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)

    @on_gpu("number", (n for n in range(30)), ids="case {}".format)
    def marked(number: int) -> None: ...

    marks = {mark.name: mark for mark in marked.pytestmark}
    names, cases = marks["parametrize"].args
    assert names == "number" and cases == list(range(30 if there else 1))
    assert marks["parametrize"].kwargs["ids"](3) == "case 3"
    assert marks["skipif"].args == (not there,) and "30 cases" in marks["skipif"].kwargs["reason"]
    assert "gpu" in marks
