"""What evictions ask of a model: queries before RoPE, inputs, projections, frequencies."""

from __future__ import annotations

import functools

import accelerate
import attrs
import pytest
import torch

from kvpolicy import CachePipeline, Eviction, Tokens, UnsupportedError, per_layer
from kvpolicy.adapters.hf import attach, fit_report, load_cache, spec_of
from kvpolicy.adapters.hf.asked import known_of, output_weight
from kvpolicy.adapters.hf.models import served
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from tests.support.adapters.faults import snapshot
from tests.support.adapters.models import SIZES, prompt, tiny


@attrs.frozen(kw_only=True)
class Asking(Eviction):
    """Keeps a copy of what it is shown."""

    budget: Tokens = Tokens(9)
    when: str = "decode"
    query_stats: bool = True
    hidden: int = 3
    output_weight: bool = True
    rope: bool = True
    seen: list = attrs.field(factory=list, eq=False, repr=False, metadata={"fingerprint": False})

    def score(self, view):
        self.seen.append(view)
        _ = self.query_stats and view.query_stats, view.recent_values
        return view.positions.float()


def pipeline(**asked):
    return CachePipeline(eviction=Asking(**asked), window=4)


def watched(model, name):
    """Outputs of the submodule `name` of each attention module, and what projects its output."""
    out, ins, handles = [], [], []
    for layer in model.model.layers:
        attention = layer.self_attn
        handles.append(
            getattr(attention, name).register_forward_hook(lambda m, a, y: out.append(y.clone()))
        )
        handles.append(
            attention.register_forward_pre_hook(
                lambda m, a, kw: ins.append(kw["hidden_states"].clone()), with_kwargs=True
            )
        )
    return out, ins, handles


def check(model, asking, out, ins, mask):
    """The views of the prompt's end, one a layer, against what went through the layers."""
    for index, view in enumerate(asking.seen[:2]):
        q = out[index].view(*mask.shape, 4, 16).transpose(1, 2)
        for row, real in enumerate(mask.bool()):
            mine = q[row][:, real].double()
            away = mine - mine.mean(1, keepdim=True)
            stats = view.query_stats
            assert int(stats.tokens[row]) == int(real.sum())
            assert (stats.mean[row] - mine.mean(1)).abs().max() < 1e-5 * mine.abs().max()
            wanted = away.mT @ away / mine.shape[1]
            assert (stats.covariance[row] - wanted).abs().max() < 1e-5 * wanted.abs().max()
            assert torch.equal(view.hidden[row], ins[index][row][real][-3:])
        weight = model.model.layers[index].self_attn.o_proj.weight
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        ours = torch.einsum("hd,hdo->o", x, view.output_weight)
        assert torch.allclose(ours, weight @ x.flatten(), atol=1e-5)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_eviction_sees_what_went_through_the_layers(kind, compile, monkeypatch):
    if compile:
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = tiny(kind)
    before = snapshot(model)
    inputs, pipe = prompt([33, 21]), pipeline()
    with attach(model, pipe, compile=compile, **SIZES) as attached:
        cache = attached.read(**inputs)
        eager = list(pipe.eviction.seen)
    assert snapshot(model) == before
    out, ins, handles = watched(model, "q_norm" if kind == "qwen3" else "q_proj")
    with attach(model, pipe, **SIZES) as attached:
        pipe.eviction.seen.clear()
        attached.read(**inputs)
    for handle in handles:
        handle.remove()
    check(model, pipe.eviction, out, ins, inputs["attention_mask"])
    for a, b in zip(eager, pipe.eviction.seen, strict=True):
        assert torch.allclose(a.query_stats.covariance, b.query_stats.covariance, atol=1e-4)
        assert torch.allclose(a.hidden, b.hidden, atol=1e-4)
    assert cache.report().statistics > 0


def test_frequencies_turn_queries_as_the_model_does(monkeypatch):
    model, pipe, found, queries = tiny(), pipeline(), [], []
    rope = known_of(model, served(model), frozenset({"rope"}))[0]["rope"]
    own = CachePipeline.attend

    def attend(self, state, layer, query, *args, **given):
        found.append(query.clone())
        queries.append(given["query_pre"].clone())
        return own(self, state, layer, query, *args, **given)

    monkeypatch.setattr(CachePipeline, "attend", attend)
    with attach(model, pipe, **SIZES) as attached:
        attached.read(**prompt([33]))
    angles = rope.angles(torch.arange(33))
    turned = rope.turned(queries[0], angles.cos() * rope.factor, angles.sin() * rope.factor)
    assert (turned - found[0]).abs().max() < 1e-5 * turned.abs().max()
    assert not torch.allclose(queries[0], found[0], atol=1e-2)


def test_decoded_tokens_count_after_a_fork_and_a_file_too(tmp_path):
    model, pipe = tiny(), pipeline()
    ids, shown = torch.tensor([[5], [6]]), []
    with attach(model, pipe, **SIZES) as attached, torch.no_grad():
        cache = attached.read(**prompt([20, 13]))
        cache.save(tmp_path / "cache")
        back = load_cache(model, pipe, tmp_path / "cache", **SIZES)
        for each in (cache.fork(), cache, back):
            for _ in range(12):
                model(ids, past_key_values=each)
            shown.append(pipe.eviction.seen[-1])
    assert shown[0].query_stats.tokens.tolist() == shown[0].lengths.tolist() == [32]
    for other in shown[1:]:
        pairs = zip(shown[0].query_stats, other.query_stats, strict=True)
        assert all(torch.allclose(*pair, atol=1e-4) for pair in pairs)
        assert torch.allclose(shown[0].hidden, other.hidden, atol=1e-5)


def test_models_of_other_shapes():
    """Transposed projections, queries of a fused one, layers without RoPE and with YaRN."""
    gpt2 = tiny_model("gpt2")
    known = known_of(gpt2, served(gpt2), frozenset({"output_weight", "rope"}))
    assert known[0]["rope"] is None
    weight = known[0]["output_weight"]()
    assert torch.allclose(weight.flatten(0, 1), gpt2.transformer.h[0].attn.c_proj.weight, atol=1e-6)
    neox = served(tiny_model("gpt_neox")).layers[0]
    assert neox.pre_query.form == "module" and neox.pre_query.module.endswith("query_key_value")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}
    yarn["original_max_position_embeddings"] = 64
    model = tiny(rope_parameters=yarn)
    rope = known_of(model, served(model), frozenset({"rope"}))[0]["rope"]
    assert rope.factor == pytest.approx(model.model.rotary_emb.attention_scaling)
    assert rope.frequencies == tuple(model.model.rotary_emb.inv_freq.double().tolist())


@pytest.mark.parametrize(
    ("name", "asked", "says"),
    [
        ("qwen3_next", "output_weight", "no submodule projects what its attention gives"),
        ("bitnet", "output_weight", "no submodule projects what its attention gives"),
        ("hunyuan_v1_dense", "query_pre", "normed by weights after the rotation"),
        ("dynamic", "rope", "change with the length"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(name, asked, says):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny(rope_parameters=rope) if name == "dynamic" else tiny_model(name)
    options = dict.fromkeys(("query_stats", "output_weight", "rope"), False) | {"hidden": 0}
    options |= {"query_stats" if asked == "query_pre" else asked: True}
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=f"^{asked}: .* in layer 0 .*{says}"):
        attach(model, pipeline(**options), **SIZES)
    assert snapshot(model) == before
    with attach(model, pipeline(**dict.fromkeys(options, 0)), **SIZES):
        pass


def test_projections_that_are_not_plain():
    """Adapted, offloaded and quantised ones are read off their forward."""
    linear = torch.nn.Linear(32, 24)
    plain = output_weight(linear, 2, 16, torch.float32, torch.device("cpu"))
    assert plain.data_ptr() == linear.weight.data_ptr() and plain.shape == (2, 16, 24)

    class Halved(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", (linear.weight.data * 2).half())

        def forward(self, x):
            return torch.nn.functional.linear(x, self.qweight.float() / 2, linear.bias)

    found = output_weight(Halved(), 2, 16, torch.float32, torch.device("cpu"))
    assert torch.allclose(found, plain, atol=1e-3)
    model, pipe = tiny(), pipeline()
    wanted = model.model.layers[0].self_attn.o_proj.weight.detach().clone()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.o_proj.weight.device.type == "meta"
    with attach(model, pipe, **SIZES) as attached:
        attached.read(**prompt([20]))
    weight = pipe.eviction.seen[0].output_weight
    assert torch.allclose(weight.flatten(0, 1).T, wanted, atol=1e-6)


def test_layers_without_the_policy_hold_nothing():
    model = tiny(layers=3)
    policy = per_layer(Asking(), {range(2): Asking(query_stats=False, hidden=0)})
    with attach(model, CachePipeline(eviction=policy, window=4), **SIZES) as attached:
        state = attached.read(**prompt([20])).state
        assert [x.query_ring is None for x in state.layers] == [True, True, False]
        plan = fit_report(model, 20, pipeline=attached.pipeline, **SIZES)
        assert plan.statistics == attached.pipeline.report(state).statistics > 0
    assert spec_of(model).hidden == 64
