"""A model whose layers lie on two devices does with a pipeline what the same does on one."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from transformers import cache_utils

from kvpolicy import CachePipeline, JudgeQ, KVzip, UnsupportedError
from kvpolicy.adapters.hf import attach, load_cache
from kvpolicy.adapters.hf.rule.own_run import OwnRun
from kvpolicy.adapters.hf.rule.runs import PROMPT, STEPS
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from kvpolicy.adapters.hf.rule.untouched import untouched
from tests.support.adapters.many import many, prompts
from tests.support.adapters.many_devices import LAYERS, PIPELINES, Pair, dispatched
from tests.support.adapters.models import SIZES, prompt, tiny
from tests.support.labelled import ONE, TWO, Labels, spread, without_labels

# transformers says so of models whose embeddings are offloaded.
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
GPUS = torch.cuda.device_count() > 1
NEEDS = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs two CUDA devices")]
WAYS = [
    pytest.param("labels", marks=pytest.mark.skipif(bool(without_labels), reason=without_labels)),
    *(pytest.param(way, marks=NEEDS) for way in ("by hooks", "by accelerate", "offloaded")),
]


@pytest.fixture(params=WAYS)
def pair(request):
    model = tiny(layers=LAYERS)
    if request.param == "labels":
        with Labels():
            parts = spread(copy.deepcopy(model), [ONE, ONE, TWO, TWO])
        return Pair(model, parts, ONE, Labels)
    gpus = [torch.device("cuda", n) for n in range(2)]
    parts = copy.deepcopy(model)
    if request.param == "by hooks":
        parts = spread(parts, [gpus[0], gpus[1], gpus[0], gpus[1]])
    else:
        parts = dispatched(parts, gpus, request.param == "offloaded")
    return Pair(model.to(gpus[0]), parts, gpus[0], contextlib.nullcontext)


def kept(cache):
    state = cache.state
    return [
        [state.kept(layer, row, head).tolist() for head in range(cache.spec.kv_heads)]
        for layer in range(len(state.layers))
        for row in range(state.batch)
    ]


def there(inputs, device):
    return {name: x.to(device) for name, x in inputs.items()}


def told(report):
    return [getattr(report, x) for x in ("tokens", "admitted", "stored", "evicted", "policies")]


def equal(one, two):
    """Tokens, kept positions and reports of both."""
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x != "adaptive")) for x in PIPELINES]
)
def test_generate(pair, name):
    def run(model, device):
        options = {"max_new_tokens": 12, "do_sample": False}
        with attach(model, PIPELINES[name], **SIZES) as attached:
            cache = attached.new_cache()
            given = there(prompt([33, 21]), device)
            out = model.generate(**given, **options, past_key_values=cache)
            where = {x.device for x in cache.state.layers}
            assert len(where) == 1 + (model is pair.parts)
            if model is pair.parts:
                assert attached.served.probe.way == "in place" or "meta" in str(model.device)
                assert attached.decoding.startswith("eager: ")
            return out.cpu(), kept(cache), told(cache.report())

    equal(*pair.both(run))


@pytest.mark.slow
def test_a_cache_that_is_read_forked_asked_and_filed(pair, tmp_path):
    def run(model, device):
        with attach(model, PIPELINES["adaptive"], **SIZES) as attached:
            given = there(prompt([40, 23]), device)
            cache = attached.read(**given, chunk_size=11)
            tail = there(prompt([5, 5], seed=2), device)["input_ids"]
            asked = attached.ask(cache, tail, max_new_tokens=6)
            cache.batch_select_indices(torch.tensor([1, 0, 1]))
            again = attached.ask(cache, tail[:1].expand(3, -1), max_new_tokens=6)
            cache.begin_prompt()
            model(tail[:1].expand(3, -1), past_key_values=cache)
            cache.crop(-2)
            file = tmp_path / ("two" if model is pair.parts else "one")
            cache.save(file)
            found = [x.cpu() for x in (asked, again)] + [kept(cache), told(cache.report())]
            for name in ("one", "two")[: 1 + (model is pair.parts)]:
                other = load_cache(model, attached.pipeline, tmp_path / name, **SIZES)
                assert kept(other) == kept(cache)
                other.end_prompt()
                out = attached.ask(other, tail[:1].expand(3, -1), max_new_tokens=6)
                found.append(out.cpu())
            if model is pair.parts:
                assert torch.equal(found.pop(), found[-1])
            return found

    equal(*pair.both(run))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["beams", "prompt lookup", "sampled"])
def test_other_ways_to_generate(pair, way):
    options = {
        "beams": {"num_beams": 3, "do_sample": False},
        "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
        "sampled": {"do_sample": True, "top_k": 1},
    }[way]

    def run(model, device):
        with attach(model, PIPELINES["gate"], **SIZES):
            out = model.generate(prompt([30])["input_ids"].to(device), max_new_tokens=9, **options)
            return [out.cpu()]

    equal(*pair.both(run))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adaptive", "snapkv"])
def test_generate_many(pair, name):
    given = [(n, 3 + n % 5) for n in (40, 9, 31, 2, 26, 17)]

    def run(model, device):
        most = [n for _, n in given]
        asked = list(zip(prompts(given), most, strict=True))
        with attach(model, PIPELINES[name], **SIZES) as attached:
            done = many(attached, asked, slots=3, tokens_per_call=16)
            return [[int(token) for token in done[n].tokens] for n in sorted(done)]

    equal(*pair.both(run))


@pytest.mark.slow
@pytest.mark.parametrize("caps", [{"max_tokens": 30}, {"max_bytes": 6 * 64 * 4 * 132}])
def test_caps_that_evict(pair, caps):
    def run(model, device):
        with attach(model, PIPELINES["across layers"], **SIZES, **caps, at_cap="evict") as attached:
            out = model.generate(
                **there(prompt([33, 21]), device), max_new_tokens=12, do_sample=False
            )
            report = attached.last_report()
            return out.cpu(), max(map(max, report.stored)) <= 30 or "max_bytes" in caps

    one, two = pair.both(run)
    assert one[1] and two[1]
    equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("offloads", [False, True])
def test_hooks_of_accelerate(offloads):
    """Which move weights and activations, here between labels."""
    if without_labels:
        pytest.skip(without_labels)
    model, given = tiny(layers=LAYERS), [(20, 4), (9, 6), (31, 5)]
    with Labels():
        parts = dispatched(copy.deepcopy(model), [ONE, TWO], offloads)

    def run(model, device):
        most = [n for _, n in given]
        asked = list(zip(prompts(given), most, strict=True))
        with attach(model, PIPELINES["adaptive"], **SIZES) as attached:
            out = model.generate(**there(prompt([33, 21]), device), max_new_tokens=9)
            done = many(attached, asked, slots=2)
            return [out.cpu(), [[int(x) for x in done[n].tokens] for n in sorted(done)]]

    equal(*Pair(model, parts, ONE, Labels).both(run))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lfm2", "gemma4_text"])
def test_states_and_shared_keys(kind, tmp_path):
    """Layers without attention on the second device, and layers there that read others' keys."""
    if without_labels:
        pytest.skip(without_labels)
    if kind == "gemma4_text" and not hasattr(cache_utils, "KVSharingDict"):
        pytest.skip("shared keys stay where they are before transformers 5.23")
    model = tiny_model(kind).eval()
    half = len(model.model.layers) // 2
    with Labels():
        parts = spread(copy.deepcopy(model), [ONE] * half + [TWO] * half)

    def run(model, device):
        ids, tail = (prompt([n])["input_ids"].to(device) % 40 + 20 for n in (40, 3))
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        with attach(model, PIPELINES["snapkv"], **SIZES) as attached:
            found = [model.generate(ids, **options).cpu()]
            cache = attached.read(ids)
            cache.save(tmp_path / "cache")
            other = load_cache(model, attached.pipeline, tmp_path / "cache", **SIZES)
            return [*found, *(attached.ask(x, tail, **options).cpu() for x in (cache, other))]

    one, two = Pair(model, parts, ONE, Labels).both(run)
    equal(one, two)
    assert torch.equal(*two[1:])


@pytest.mark.slow
def test_replays(pair):
    embeds = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    zips = CachePipeline(eviction=KVzip(budget=14), window=5)
    judge = CachePipeline(eviction=JudgeQ(budget=14, embeds=embeds), window=5)

    def run(model, device):
        ids = prompt([33])["input_ids"].to(device)
        found = []
        for pipeline in (zips, judge):
            with attach(model, pipeline, **SIZES) as attached:
                cache = attached.new_cache()
                model(ids, past_key_values=cache)
                if pipeline is zips:
                    attached.replay(cache, ids[:, :9])
                else:
                    attached.replay(cache, inputs_embeds=embeds[None].to(device))
                cache.end_prompt()
                found.append(kept(cache))
        return found

    equal(*pair.both(run))


def test_layers_whose_weights_are_nowhere_are_refused_unchanged():
    model = tiny(layers=2)
    model.model.layers[1].to("meta")
    named, own = model.config._attn_implementation, set(vars(model))
    with pytest.raises(
        UnsupportedError, match="layer 1 is on the meta device, .* device_map='auto'"
    ):
        attach(model, CachePipeline())
    assert model.config._attn_implementation == named
    assert set(vars(model)) == own
    assert not model.model._forward_pre_hooks


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="needs two CUDA devices")
def test_device_map(tmp_path):
    """As users load it: by transformers, over what memory each GPU is said to have."""
    model = tiny(layers=LAYERS)
    model.save_pretrained(tmp_path)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    parts = (
        type(model)
        .from_pretrained(
            tmp_path, device_map="auto", max_memory={0: 5 * layer // 2, 1: 100 * layer}
        )
        .eval()
    )
    assert len(set(parts.hf_device_map.values())) == 2, parts.hf_device_map
    pair = Pair(model.to("cuda:0"), parts, torch.device("cuda:0"), contextlib.nullcontext)

    def run(model, device):
        with attach(model, PIPELINES["adaptive"], **SIZES):
            ids = prompt([33, 21])["input_ids"].to(device)
            return [model.generate(ids, max_new_tokens=12, do_sample=False).cpu()]

    equal(*pair.both(run))


def test_masks_that_were_copied_to_another_device():
    """The probe knows what made the mask of a layer on the second device."""
    if without_labels:
        pytest.skip(without_labels)
    with Labels():
        model = spread(tiny("qwen2-sliding", layers=2), [ONE, TWO])
        run = OwnRun(model)
        with untouched(model):
            run.run(torch.arange(3, 3 + PROMPT + STEPS, device=ONE)[None])
    assert [call.mask is not None for call in run.calls] == [True] * 4
    assert len({call.mask for call in run.calls[:2]}) == 2
