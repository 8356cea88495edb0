"""The example of a new policy runs, and its policies take effect."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import attrs
import pytest
import torch
import torch.nn.functional as F

from kvpolicy import BudgetView, CachePipeline, EvictionView, QueryStats, Tokens, Write
from kvpolicy.selection import PromptView

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("new_policy", ROOT / "examples/new_policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_prints_what_took_effect(example, capsys):
    example.main([])
    out = capsys.readouterr().out
    assert out.startswith("the three policies and the budget keep the contract")
    numbers = [int(n) for n in re.findall(r"(\d+) \(dense (\d+)\)", out) for n in n]
    read, dense_read, bytes_held, dense_bytes = numbers
    assert dense_read == 408
    assert read <= 64
    assert bytes_held < dense_bytes


def test_keydiff_drops_the_keys_nearest_to_the_mean(example):
    view = _view(torch.randn(1, 1, 24, 8), count=20)
    unit = F.normalize(view.keys[0, 0, :20].double(), dim=-1)
    wanted = -(unit @ F.normalize(unit.sum(0), dim=0))
    score = example.KeyDiff(budget=Tokens(8)).score(view)[0, 0, :20]
    torch.testing.assert_close(score.double(), wanted, rtol=0, atol=1e-5)


def test_every_policy_alone_takes_effect(example):
    admitted = example.run(CachePipeline(admission=example.Strided(), window=32))
    assert 0.25 < admitted.mean_admitted < 0.27
    read = example.run(CachePipeline(selection=example.MeanKey(budget=Tokens(64)), window=32))
    assert read.mean_read <= 64 < min(map(min, read.stored))
    kept = example.run(CachePipeline(eviction=example.KeyDiff(budget=Tokens(96)), window=32))
    assert kept.evicted == [[400 - 96] * 2] * 2


def test_doc_shows_the_example(example):
    text = (ROOT / "docs/writing-a-policy.md").read_text(encoding="utf-8")
    source = (ROOT / "examples/new_policy.py").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(@attrs.*?)```", text, re.DOTALL)
    names = ("Strided", "MeanKey", "KeyDiff", "SquareRoot")
    shown = [x for x in blocks if re.search(r"^class (\w+)", x, re.MULTILINE)[1] in names]
    assert len(shown) == 4
    for block in shown:
        assert block in source


def test_doc_names_every_field_that_a_policy_is_given():
    text = (ROOT / "docs/writing-a-policy.md").read_text(encoding="utf-8")
    given = [*Write._fields, *QueryStats._fields, *PromptView._fields]
    for kind in (EvictionView, BudgetView):
        given += [field.alias for field in attrs.fields(kind)]
    assert [name for name in given if f"`{name}`" not in text] == []


def _view(keys, count):
    from kvpolicy import EvictionView

    batch, heads, slots, dim = keys.shape
    valid = (torch.arange(slots) < count).expand(batch, heads, slots)
    return EvictionView(
        layer=0,
        keys=keys.masked_fill(~valid[..., None], 0),
        values=keys,
        positions=torch.arange(slots).expand_as(valid),
        valid=valid,
        marked=valid,
        recent_keys=keys[:, :, :4],
        recent_valid=torch.ones(batch, 4, dtype=torch.bool),
        lengths=torch.tensor([slots + 4] * batch),
        scale=1.0,
    )
