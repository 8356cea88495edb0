"""Short prompts by graphs cut at the attentions: the tokens and kept sets of an eager forward."""

from __future__ import annotations

import contextlib
from unittest import mock

import attrs
import pytest
import torch

from kvpolicy import CachePipeline, CapacityError, Quest, SnapKV
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf import compile as compiling
from kvpolicy.adapters.hf.compile import FEW, traced
from kvpolicy.adapters.hf.many.requests import Request
from kvpolicy.adapters.hf.piecewise import kinds
from kvpolicy.adapters.hf.short_prompts import EAGER, rounded
from tests.support.adapters.models import gate, pipelines, prompt, tiny
from tests.support.adapters.pieces import recorded

SIZES = {"page_size": 4}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
WHOLE = CachePipeline(
    admission=gate(), selection=Quest(budget=16), eviction=SnapKV(budget=12, observation=4)
)
DENSE = CachePipeline(window=8)
LENGTHS = (30, 21, 33, 64, 65, 40, 100, 2, 31)


@contextlib.contextmanager
def pieces():
    """Piecewise graphs: those of the device, or what stands for them without one."""
    short = mock.patch.object(compiling, "FEW", FEW)  # else these tests compile short prompts
    with short, traced(), contextlib.nullcontext() if CUDA else recorded():
        yield


def ids(length, seed=None):
    return prompt([length], seed=length if seed is None else seed)["input_ids"].to(DEVICE)


@contextlib.contextmanager
def by_pieces(model, pipeline, **sizes):
    """An attachment whose next prompt call is captured."""
    with pieces(), attach(model, pipeline, compile=True, **SIZES, **sizes) as attached:
        for _ in range(EAGER):
            model.generate(ids(5), max_new_tokens=1)
        yield attached


def graphs(attached):
    return {key[0] for key in attached.short_prompts.captured}


@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding", "qwen3"])
@pytest.mark.parametrize("pipeline", [WHOLE, DENSE], ids=["gate, Quest, SnapKV", "all"])
def test_tokens_and_reports(kind, pipeline):
    """Of prompts that are shorter or longer than the one before, each of a cache of its own."""
    model = tiny(kind).to(DEVICE)
    with attach(model, pipeline, **SIZES) as attached:
        plain = [
            (model.generate(ids(n), max_new_tokens=9), attached.last_report()) for n in LENGTHS
        ]
    with by_pieces(model, pipeline) as attached:
        for n, (tokens, report) in zip(LENGTHS, plain, strict=True):
            assert torch.equal(model.generate(ids(n), max_new_tokens=9), tokens)
            # A cache that is used again keeps the page tables that it has.
            assert attrs.evolve(attached.last_report(), tables=report.tables) == report
        assert attached.prompts == "captured"
        assert graphs(attached) == {64, 128}
        assert all(len(x.cuts) == 2 for x in attached.short_prompts.captured.values())


@pytest.mark.parametrize("pipeline", [WHOLE, DENSE], ids=["gate, Quest, SnapKV", "all"])
def test_parts_and_turns(pipeline):
    """What follows in the same cache, whose columns a graph knows nothing of."""
    model, parts = tiny().to(DEVICE), torch.cat([ids(n) for n in LENGTHS], 1).split(50, 1)

    @torch.no_grad()
    def logits(attached):
        cache, found = attached.new_cache(), []
        for n, part in enumerate(parts):
            cache.begin_prompt()
            found.append(model(part, past_key_values=cache).logits)
            if n % 2:
                cache.end_prompt()
        return found, [cache.state.kept(layer, 0, head) for layer in (0, 1) for head in (0, 1)]

    with attach(model, pipeline, **SIZES) as attached:
        wanted, kept = logits(attached)
    with by_pieces(model, pipeline) as attached:
        found, own = logits(attached)
        assert graphs(attached) == {64}
    assert max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True)) < 2e-5
    assert [x.tolist() for x in own] == [x.tolist() for x in kept]


def test_calls_that_many_requests_share():
    """Parts of several prompts in one row."""
    model = tiny().to(DEVICE)
    asked = [Request(ids(n)[0], id=n, max_new_tokens=6) for n in (30, 9, 44, 21, 5, 60)]

    def answers(attached):
        found = attached.generate_many(asked, slots=3, tokens_per_call=24)
        return {x.id: x.tokens for x in found}

    with attach(model, WHOLE, **SIZES) as attached:
        wanted = answers(attached)
    with by_pieces(model, WHOLE) as attached:
        assert answers(attached) == wanted and graphs(attached) == {64}


def test_embeddings_have_graphs_of_their_own():
    model, embed = tiny().to(DEVICE), None
    with by_pieces(model, DENSE) as attached, torch.no_grad():
        embed = model.get_input_embeddings()
        for _ in range(2):
            left = model(ids(20), past_key_values=attached.new_cache()).logits
            right = model(inputs_embeds=embed(ids(20)), past_key_values=attached.new_cache()).logits
            assert float((left - right).abs().max()) < 2e-5
        assert len(attached.short_prompts.captured) == 2 and graphs(attached) == {64}


def test_what_is_handed_out_stays():
    """Hidden states are not overwritten by the next forward."""
    model = tiny().to(DEVICE)
    with by_pieces(model, DENSE) as attached, torch.no_grad():
        first = model.model(ids(20), past_key_values=attached.new_cache()).last_hidden_state
        before = first.clone()
        model.model(ids(31), past_key_values=attached.new_cache())
        assert torch.equal(first, before) and first.shape == (1, 20, model.config.hidden_size)
        assert graphs(attached) == {64}  # by position


OTHERS = {
    "a batch": lambda model: model(**on(prompt([9, 7]))),
    "rows without padding": lambda model: model(**on(prompt([9, 9]))),
    "padding": lambda model: model(ids(9), attention_mask=torch.tensor([[0] + [1] * 8]).to(DEVICE)),
    "one token": lambda model: model(ids(1)),
    "a long one": lambda model: model(ids(FEW)),
}


def on(inputs):
    return {name: x.to(DEVICE) for name, x in inputs.items()}


@pytest.mark.parametrize("other", OTHERS)
def test_other_calls_are_eager(other):
    model = tiny(max_position_embeddings=2 * FEW).to(DEVICE)
    with by_pieces(model, DENSE) as attached, torch.no_grad():
        OTHERS[other](model)
        assert not attached.short_prompts.captured
        model(ids(9))
        assert graphs(attached) == {64}


def test_a_hook_of_others_runs_every_time():
    """Eagerly, since graphs would leave it out."""
    model, seen = tiny().to(DEVICE), []
    with by_pieces(model, DENSE) as attached, torch.no_grad():
        plain = model(ids(9)).logits
        assert graphs(attached)
        layer = model.model.layers[0].mlp
        hook = layer.register_forward_hook(lambda module, args, out: seen.append(1) or 2 * out)
        assert not torch.equal(model(ids(9)).logits, plain) and not graphs(attached)
        model(ids(9))
        assert len(seen) == 2
        hook.remove()
        assert torch.equal(model(ids(9)).logits, plain) and graphs(attached)


def test_other_weights_and_forwards_are_captured_anew():
    model = tiny().to(DEVICE)
    with by_pieces(model, DENSE) as attached, torch.no_grad():
        model(ids(9))
        mlp = model.model.layers[1].mlp
        mlp.up_proj.weight = torch.nn.Parameter(-mlp.up_proj.weight)
        one = model(ids(9)).logits
        mlp.forward = lambda x: torch.zeros_like(x)
        two = model(ids(9)).logits
        assert graphs(attached) == {64}
        attached.detach()
        assert float((model(ids(9)).logits - two).abs().max()) < 2e-5
        del mlp.forward
        assert float((model(ids(9)).logits - one).abs().max()) < 2e-5


def test_a_cap_leaves_the_cache_as_it_was():
    model = tiny().to(DEVICE)
    with by_pieces(model, DENSE, max_tokens=40) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(ids(30), past_key_values=cache)
        before = cache.columns, cache.state.lengths, cache.report()
        with pytest.raises(CapacityError):
            model(ids(30), past_key_values=cache)
        assert (cache.columns, cache.state.lengths, cache.report()) == before
        assert model(ids(8), past_key_values=cache).logits.isfinite().all()


def test_a_forward_that_counts_columns_is_eager(monkeypatch):
    """A graph would hold the number fast."""
    model = tiny().to(DEVICE)
    layer = model.model.layers[1].mlp
    forward = layer.forward
    held = []

    def counts(x):
        return forward(x) * (1 + held[0].get_seq_length())

    with by_pieces(model, DENSE) as attached, torch.no_grad():
        cache = attached.new_cache()
        held.append(cache)
        model(ids(30), past_key_values=cache)
        assert attached.prompts == "captured"
    monkeypatch.setattr(layer, "forward", counts, raising=False)
    with by_pieces(model, DENSE) as attached, torch.no_grad():
        held[:] = [attached.new_cache()]
        model(ids(30), past_key_values=held[0])
        assert attached.prompts.startswith("eager: at ") and "how long" in attached.prompts
        model(ids(30), past_key_values=held[0])
        assert held[0].columns == 60 and not graphs(attached)


def test_detaching_gives_the_forward_back():
    model = tiny().to(DEVICE)
    with pieces(), attach(model, DENSE, compile=True) as attached:
        assert "forward" in vars(model.model)
        assert attached.prompts == "not yet"
    assert "forward" not in vars(model.model)
    with by_pieces(model, DENSE) as attached:
        model(ids(9))
        assert graphs(attached)
    assert not graphs(attached) and attached.short_prompts.pool is None
    with attach(model, DENSE):
        assert "forward" not in vars(model.model)


@pytest.mark.skipif(CUDA, reason="what a device without graphs says")
def test_without_graphs():
    with attach(tiny(), pipelines()["gate"], compile=True) as attached:
        assert attached.prompts == "eager: the model is on cpu; only CUDA devices capture"
        assert "forward" not in vars(attached.decoder)


def test_records_that_a_config_asks_for_are_eager():
    """Graphs hand hidden states on and nothing else."""
    model = tiny().to(DEVICE)
    with by_pieces(model, DENSE) as attached:
        model.model(ids(9))
        assert graphs(attached) == {64}
        replays = []
        for captured in attached.short_prompts.captured.values():
            captured.replay = lambda *args: replays.append(args)
        model.config.output_router_logits = True
        assert model.model(ids(9)).last_hidden_state is not None and not replays


def test_positions_of_several_axes_are_of_one_kind():
    """Whatever their number of columns; embeddings of another width are not."""
    told = [
        {"inputs_embeds": torch.zeros(1, n, 8), "position_ids": torch.zeros(3, 1, n)}
        for n in (5, 9)
    ]
    assert kinds(told[0]) == kinds(told[1])
    assert kinds(told[0]) != kinds(told[0] | {"inputs_embeds": torch.zeros(1, 5, 16)})
    assert kinds(told[0]) != kinds(told[0] | {"position_ids": torch.zeros(1, 5)})


def test_sizes():
    """Each a size itself, and no more than an eighth above what is asked."""
    sizes = {n: rounded(n) for n in range(2, FEW)}
    assert all(size >= n and rounded(size) == size for n, size in sizes.items())
    assert all(size - n < 64 or size <= 1.125 * n for n, size in sizes.items())
    assert len(set(sizes.values())) == 32
