"""What is warmed is all that requests need, and nobody notices that it ran."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import H2O, CachePipeline, Quest, SnapKV, attach
from kvpolicy.adapters.hf import Request
from kvpolicy.adapters.hf.attach import Attachment
from kvpolicy.adapters.hf.compile import traced
from tests.support.adapters.models import gate, prompt, tiny
from tests.support.kernels.variants import new, variants

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at interpreted launches")
FEW = {"num_attention_heads": 2, "num_key_value_heads": 1, "layers": 1}
PARTS = {
    "gate-quest-snapkv": {
        "admission": gate(layers=1, heads=1), "selection": Quest(budget=16),
        "eviction": SnapKV(budget=24, observation=4),
    },
    "h2o": {"eviction": H2O(budget=20), "window": 5},
}  # fmt: skip


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_requests_compile_nothing_after_it(parts, monkeypatch) -> None:
    model = tiny(**FEW)
    compiled = variants(monkeypatch, run=True)
    with attach(model, CachePipeline(backend="triton", **parts), page_size=4) as attached:
        found = attached.warm(batch=2, length=40)
        assert found.left_out == ()
        before = {name: set(kinds) for name, kinds in compiled.items()}
        assert {"_advance", "_split", "_reduce", "_decode_write"} <= set(before)

        def generate(*lengths: int, **options) -> None:
            model.generate(**prompt(lengths), max_new_tokens=3, do_sample=False, **options)

        for lengths in ((1,), (4,), (39,), (37, 2)):
            generate(*lengths)
        generate(33, prefill_chunk_size=14)
        cache = attached.read(prompt([29])["input_ids"])
        attached.ask(cache, prompt([3, 3])["input_ids"], max_new_tokens=2, do_sample=False)
        many = [Request([n] * n, max_new_tokens=3, do_sample=False) for n in (31, 3)]
        assert len(list(attached.generate_many(many, slots=2, tokens_per_call=16))) == 2
        assert new(compiled, before) == {}
        generate(3, 3, 3)  # more sequences than were asked for
        assert "_split" in new(compiled, before)


@pytest.mark.slow
def test_layers_compile_for_one_and_for_several_sequences() -> None:
    model = tiny(layers=1)
    with traced(), attach(model, CachePipeline(window=5), compile=True) as attached:
        attached.warm(batch=2)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert before
        for lengths in ((7,), (30, 2), (9, 30, 17)):
            model.generate(**prompt(lengths), max_new_tokens=3, do_sample=False)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
def test_nobody_notices() -> None:
    model, told = tiny(layers=1), []
    pipeline = CachePipeline(eviction=SnapKV(budget=8, observation=4))
    with traced(), attach(model, pipeline, compile=True) as attached:
        model.generate(**prompt([20]), max_new_tokens=2, do_sample=False)
        before, state = attached.last_report(), torch.get_rng_state()
        found = attached.warm(2, 9, lambda *said: told.append(said))
        assert attached.last_report() is before
        assert torch.equal(torch.get_rng_state(), state)
        each = ["1 x 9 tokens", "2 x 9 tokens", "2 x 9 tokens, padded", "0 kernels"]
        assert told == [(number, 3, said) for number, said in enumerate(each)]
        assert (found.kernels, found.left_out) == ((), ())


def test_nothing_runs_where_nothing_compiles(capsys) -> None:
    model = tiny(layers=1)
    with attach(model, CachePipeline(), warm=True) as attached:
        assert "0 of 0" in capsys.readouterr().err
        with pytest.raises(ValueError, match="batch: wanted at least 1"):
            attached.warm(0)
        with pytest.raises(ValueError, match="length: wanted at least 1"):
            attached.warm(1, 0)


def test_a_failure_detaches(monkeypatch) -> None:
    model = tiny(layers=1)
    with pytest.raises(TypeError, match="warm"):
        attach(model, CachePipeline(), warm=2)

    def fails(self, **given):
        raise RuntimeError("no room")

    monkeypatch.setattr(Attachment, "warm", fails)
    with pytest.raises(RuntimeError, match="no room"):
        attach(model, CachePipeline(), warm=True)
    attach(model, CachePipeline()).detach()


@interpreted
@pytest.mark.slow
def test_requests_that_do_not_fit_are_named() -> None:
    model = tiny(**FEW)
    pipeline = CachePipeline(backend="triton", window=5)
    with attach(model, pipeline, page_size=4, max_tokens=12, interval=1) as attached:
        found = attached.warm(1, 16)
    assert any("1 x 16 tokens: max_tokens" in said for said in found.left_out)
