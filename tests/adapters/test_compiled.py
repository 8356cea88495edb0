"""attach(compile=True): the same results from one graph that all layers share."""

from __future__ import annotations

import functools
import gc
import weakref

import attrs
import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from transformers import AttentionInterface

from kvpolicy import Admission, CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf import compile as compiled
from tests.support.adapters.arguments import ATTENTION, Refused
from tests.support.adapters.faults import Fault, digest, snapshot
from tests.support.adapters.models import KINDS, SIZES, pipelines, prompt, tiny

PIPELINE = CachePipeline(window=5)
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def traced(monkeypatch):
    """Dynamo's graphs, run as they are: what depends on a graph shows without an inductor."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def both(model, pipeline, inputs, **options):
    """What generate gives with eager and with compiled layers."""
    with attach(model, pipeline, **SIZES):
        eager = model.generate(**inputs, **GREEDY, **options)
    with attach(model, pipeline, compile=True, **SIZES):
        ours = model.generate(**inputs, **GREEDY, **options)
    return eager, ours


@attrs.frozen(kw_only=True)
class Looking(Admission):
    """Decides by everything that hooks bring; fails at position `broken`."""

    window: int | None = 5
    broken: int = -1
    needs = frozenset({"key_pre", "hidden"})

    def admit(self, write):
        if (write.positions == self.broken).any() and write.layer:
            raise Fault("broken on purpose")
        assert not torch.equal(write.key, write.key_pre)
        return write.key_pre.sum(-1) + write.hidden.sum(-1) > 0


@pytest.mark.slow
def test_inductor():
    """The real compiler, on the model and pipeline that use most of it."""
    eager, ours = both(tiny("qwen3"), pipelines()["all"], prompt([33]), max_new_tokens=14)
    assert graphs() == 2
    assert torch.equal(eager.sequences, ours.sequences)
    for a, b in zip(eager.logits, ours.logits, strict=True):
        assert (a - b).abs().max() < 1e-4 < a.abs().max()
    assert digest(eager.past_key_values)[2:5] == digest(ours.past_key_values)[2:5]


@pytest.mark.slow
def test_error_budget(llama):
    """In bfloat16 at most twice the error of eager modules against float64."""
    inputs, exact = prompt([33]), tiny("llama").double()
    with attach(exact, PIPELINE):
        wanted = exact(**inputs).logits
    llama.bfloat16()
    with attach(llama, PIPELINE):
        eager = (llama(**inputs).logits - wanted).norm()
    with attach(llama, PIPELINE, compile=True):
        ours = (llama(**inputs).logits - wanted).norm()
    assert graphs() == 1
    assert 0 < ours <= 2 * eager


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(x, marks=() if x in ("qwen2-sliding", "qwen3") else pytest.mark.slow)
        for x in KINDS
    ],
    indirect=True,
)
def test_layers_share_graphs(traced, model):
    """One for prompts of every length, one for a token; two more for batches of every size."""
    batches, counts = ([9], [33], [7, 12], [8] * 3), (2, 2, 4, 4)
    options = {"max_new_tokens": 4, "do_sample": False}
    with attach(model, PIPELINE, **SIZES):
        wanted = [model.generate(**prompt(lengths), **options) for lengths in batches]
    assert graphs() == 0
    with attach(model, PIPELINE, compile=True, **SIZES):
        for lengths, tokens, count in zip(batches, wanted, counts, strict=True):
            assert torch.equal(model.generate(**prompt(lengths), **options), tokens)
            assert graphs() == count
    assert torch.equal(model.generate(**prompt([9]), **options), wanted[0])
    assert graphs() == 4


def test_short_prompts_run_the_layers_as_they_are(traced, llama, monkeypatch):
    """Whose tokens dynamo's guards would cost more than they save; tokens are compiled."""
    monkeypatch.setattr(compiled, "FEW", 40)
    for lengths, count in (([9, 19], 0), ([39], 0), ([40], 1)):
        eager, ours = both(llama, PIPELINE, prompt(lengths), max_new_tokens=1)
        assert torch.equal(eager.sequences, ours.sequences)
        assert graphs() == count
    eager, ours = both(llama, PIPELINE, prompt([9]), max_new_tokens=3)
    assert torch.equal(eager.sequences, ours.sequences)
    assert graphs() == 2


def test_a_second_attach_compiles_nothing(traced, llama):
    """Unless its policies want other hooks, which an earlier graph does not hold."""
    for pipeline, count in ((PIPELINE, 2), (pipelines()["quest"], 2), (pipelines()["gate"], 4)):
        eager, ours = both(llama, pipeline, prompt([33]), max_new_tokens=6)
        assert torch.equal(eager.sequences, ours.sequences)
        assert graphs() == count


@pytest.mark.parametrize(
    "name, options",
    [
        ("gate-quest-snapkv", {}),
        ("striped", {"prefill_chunk_size": 7}),
        ("quest", {"num_beams": 2}),
        ("striped", {"prompt_lookup_num_tokens": 3}),
    ],
)
def test_ways_to_generate(traced, llama, name, options):
    lengths = [33] if "prompt_lookup_num_tokens" in options else [33, 21]
    eager, ours = both(llama, pipelines()[name], prompt(lengths), max_new_tokens=10, **options)
    assert torch.equal(eager.sequences, ours.sequences)
    assert graphs() > 0


@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding", "qwen3"])
def test_what_policies_ask_for(traced, kind):
    pipeline = CachePipeline(admission=Looking())
    eager, ours = both(tiny(kind), pipeline, prompt([33, 21]), max_new_tokens=10)
    assert torch.equal(eager.sequences, ours.sequences)
    assert eager.past_key_values.report().admitted == ours.past_key_values.report().admitted
    caches = eager.past_key_values, ours.past_key_values
    kept = [[c.state.kept(n, 0, h).tolist() for n in (0, 1) for h in (0, 1)] for c in caches]
    assert kept[0] == kept[1] and 5 < len(kept[0][0]) < 42


def test_detach_restores_the_model(traced, qwen3):
    before = snapshot(qwen3)
    attachment = attach(qwen3, pipelines()["gate"], compile=True)
    qwen3.generate(**prompt([9]), max_new_tokens=3)
    assert all(compiled.COMPILED in layer.__dict__ for layer in qwen3.model.layers)
    attachment.detach()
    assert snapshot(qwen3) == before


def test_hooks_of_others_run(traced, llama):
    """Also those that come after a layer was compiled, and global ones."""
    module, seen = llama.model.layers[1].mlp.up_proj, []
    with attach(llama, PIPELINE, compile=True, **SIZES):
        for register in (
            module.register_forward_hook,
            torch.nn.modules.module.register_module_forward_pre_hook,
        ):
            plain = llama.generate(**prompt([9]), max_new_tokens=5)
            handle = register(lambda found, *rest: seen.append(found))
            assert torch.equal(llama.generate(**prompt([9]), max_new_tokens=5), plain)
            handle.remove()
            assert sum(found is module for found in seen) == 5
            seen.clear()


def test_a_failing_layer(traced, llama):
    """The policy's own error comes out, and the cache is as it was."""
    ids = prompt([33])["input_ids"]
    with attach(llama, CachePipeline(admission=Looking(broken=32)), compile=True, **SIZES) as one:
        cache = one.new_cache()
        llama(input_ids=ids[:, :20], past_key_values=cache)
        before = digest(cache)
        with pytest.raises(Fault):
            llama(input_ids=ids[:, 20:], past_key_values=cache)
        assert digest(cache) == before and one.forwards.owner is None
        llama(input_ids=ids[:, 20:32], past_key_values=cache)
        assert cache.columns == 32


def test_nothing_keeps_a_dropped_model(traced):
    model = tiny()
    attach(model, PIPELINE, compile=True)
    model.generate(**prompt([9]), max_new_tokens=3)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_two_models_at_once(traced, llama, qwen3):
    """Each attachment has graphs and a limit of its own."""
    plain = [m.generate(**prompt([9]), max_new_tokens=4) for m in (llama, qwen3)]
    limit = torch._dynamo.config.patch(recompile_limit=1)
    with limit, attach(llama, PIPELINE, compile=True), attach(qwen3, PIPELINE, compile=True):
        for m, tokens in zip((llama, qwen3), plain, strict=True):
            assert torch.equal(m.generate(**prompt([9]), max_new_tokens=4), tokens)


def test_the_limit_is_an_error(traced, llama):
    limit = torch._dynamo.config.patch(recompile_limit=1)
    with limit, attach(llama, PIPELINE, compile=True):
        llama(**prompt([9]))
        with pytest.raises(FailOnRecompileLimitHit):
            llama(**prompt([9, 9]))


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_recording_is_refused(traced, llama, name):
    wanted = {name: True, "return_dict_in_generate": True}
    with attach(llama, PIPELINE, compile=True):
        for call in (
            lambda: llama(**prompt([9]), **{name: True}),
            lambda: llama.generate(**prompt([9]), max_new_tokens=3, **wanted),
        ):
            with pytest.raises(UnsupportedError, match=f"^{name}: "):
                call()
        llama(**prompt([9]))


@torch.enable_grad()
def test_gradients_are_refused(traced, llama):
    with attach(llama, PIPELINE, compile=True):
        with pytest.raises(UnsupportedError, match="no_grad"):
            llama(**prompt([9]))
        llama.generate(**prompt([9]), max_new_tokens=2)


def test_models_that_cannot_be_compiled(traced, llama):
    layer, before = llama.model.layers[1], snapshot(llama)
    layer.compile()
    with pytest.raises(UnsupportedError, match="compiled already"):
        attach(llama, PIPELINE, compile=True)
    del layer.__dict__[compiled.COMPILED]
    layer._hf_hook = object()
    with pytest.raises(UnsupportedError, match="accelerate"):
        attach(llama, PIPELINE, compile=True)
    del layer._hf_hook
    assert snapshot(llama) == before


@pytest.mark.parametrize("name", [n for n, e in ATTENTION.items() if isinstance(e, Refused)])
def test_arguments_of_attention_are_refused(traced, llama, name):
    """As a model of ours would give them itself; forwards check their own before."""
    interface, entry = AttentionInterface()["kvpolicy"], ATTENTION[name]

    def changed(module, query, key, value, mask, **kwargs):
        return interface(module, query, key, value, mask, **{**kwargs, name: entry.value})

    with attach(llama, PIPELINE, compile=True) as attached:
        cache = attached.new_cache()
        AttentionInterface.register("kvpolicy", changed)
        try:
            with pytest.raises(UnsupportedError, match=f"^{entry.says or name}"):
                llama(**prompt([9]), past_key_values=cache)
        finally:
            AttentionInterface.register("kvpolicy", interface)
        assert cache.state is None
