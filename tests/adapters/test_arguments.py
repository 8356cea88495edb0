"""Every argument of generate, forwards and attention functions is honoured or refused by name."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, GenerationConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import TransformersKwargs

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.rule.tiny import causal_types, class_of
from tests.support.adapters.arguments import (
    ATTENTION,
    CONFIG,
    FORWARD,
    GENERATE,
    IDS,
    OTHER_FORWARDS,
    Elsewhere,
    Honoured,
    Inert,
    Refused,
)
from tests.support.adapters.faults import snapshot
from tests.support.adapters.models import tiny

PIPELINE = CachePipeline(window=5)
TABLES = {"generate": GENERATE, "config": CONFIG, "forward": FORWARD, "attention": ATTENTION}
MODEL = tiny()


def names_of(table):
    """The names that the installed transformers has."""
    if table == "generate":
        found = set(inspect.signature(LlamaForCausalLM.generate).parameters)
        return found - {"self", "kwargs"}
    if table == "config":
        return {name for name in GenerationConfig().__dict__ if not name.startswith("_")}
    if table == "forward":
        found = {"return_dict", *TransformersKwargs.__annotations__}
        for kind in (LlamaForCausalLM, LlamaModel):
            found |= set(inspect.signature(kind.forward).parameters)
        return found - {"self", "kwargs"}
    functions = [eager_attention_forward]
    known = AttentionInterface()
    # Continuous batching has functions of its own, over caches of its own.
    functions += [known[name] for name in known.valid_keys() if not name.startswith("paged|")]
    functions = [f for f in functions if f.__module__.startswith("transformers.")]
    found = {name for f in functions for name in inspect.signature(f).parameters}
    return found - {"module", "query", "key", "value", "kwargs"}


def test_every_name_of_another_served_forward_has_an_entry():
    """Of all causal types that docs/models.md says are served."""
    pages = Path(__file__).parents[2] / "docs" / "models.md"
    served = pages.read_text().partition("### Served")[2].partition("### Refused")[0]
    names = {line.split("`")[1] for line in served.splitlines() if line.startswith("| `")}
    kinds = [class_of(name) for name in sorted(names & set(causal_types()))]
    assert len(kinds) > 50
    found = {name for kind in kinds for name in inspect.signature(kind.forward).parameters}
    assert found - {"self", "args", "kwargs"} <= set(FORWARD) | set(OTHER_FORWARDS)


@pytest.mark.parametrize("table", TABLES)
def test_every_name_has_an_entry(table):
    assert names_of(table) <= set(TABLES[table])


def entries(kind, *tables):
    return [
        pytest.param(table, name, id=f"{table}-{name}")
        for table in tables
        for name, entry in TABLES[table].items()
        if isinstance(entry, kind)
    ]


def call(table, model, options):
    torch.manual_seed(3)
    if table == "forward":
        ids = {} if "inputs_embeds" in options else {"input_ids": IDS}
        return model(**{**ids, **options})
    options = {"input_ids": IDS, "max_new_tokens": 5, **options}
    return model.generate(**{"do_sample": False, **options})


def found_in(output):
    """All tensors of an output, and which fields it has."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, tuple | list):
        return ["("] + [x for part in output for x in found_in(part)]
    if isinstance(output, dict):
        return [x for key in output for x in (key, *found_in(output[key]))]
    return [output is None]


def same(a, b):
    a, b = found_in(a), found_in(b)
    return len(a) == len(b) and all(
        isinstance(x, torch.Tensor) == isinstance(y, torch.Tensor)
        and (
            x.shape == y.shape and torch.allclose(x.float(), y.float(), atol=1e-4)
            if isinstance(x, torch.Tensor)
            else x == y
        )
        for x, y in zip(a, b, strict=True)
    )


def three(table, name):
    """The plain call without and with the argument, and the attached one with it."""
    entry = TABLES[table][name]
    bare, options = dict(entry.base), {**entry.base, name: entry.value}
    plain = call(table, MODEL, options)
    with attach(MODEL, PIPELINE, page_size=4):
        ours = call(table, MODEL, options)
    return call(table, MODEL, bare), plain, ours


@pytest.mark.parametrize("table, name", entries(Honoured, "generate", "config", "forward"))
def test_honoured(table, name):
    without, plain, ours = three(table, name)
    assert not same(plain, without), "the value changes nothing in transformers"
    assert same(ours, plain)


@pytest.mark.parametrize("table, name", entries(Inert, "generate", "config", "forward"))
def test_inert(table, name):
    without, plain, ours = three(table, name)
    assert same(plain, without) and same(ours, plain)


@pytest.mark.parametrize("table, name", entries(Refused, "generate", "config", "forward"))
def test_refused(table, name):
    """Before the model, its config or the cache that was given is changed."""
    entry = TABLES[table][name]
    with attach(MODEL, PIPELINE):
        before = snapshot(MODEL)
        with pytest.raises(UnsupportedError, match=f"^{entry.says or name}"):
            call(table, MODEL, {**entry.base, name: entry.value})
        assert snapshot(MODEL) == before
        call(table, MODEL, {})


@pytest.mark.parametrize("name", [n for n, e in CONFIG.items() if isinstance(e, Refused)])
def test_refused_in_a_generation_config(name):
    entry = CONFIG[name]
    config = GenerationConfig(pad_token_id=0, max_new_tokens=5)
    for key, value in {**entry.base, name: entry.value}.items():
        setattr(config, key, value)
    with attach(MODEL, PIPELINE), pytest.raises(UnsupportedError, match=f"^{entry.says or name}"):
        MODEL.generate(IDS, generation_config=config)


@pytest.mark.parametrize("name", [n for n, e in ATTENTION.items() if isinstance(e, Refused)])
def test_refused_by_the_attention_function(name):
    """As a model of ours would hand it on from its forward's keywords or of its own."""
    entry = ATTENTION[name]
    attention, states = MODEL.model.layers[0].self_attn, torch.randn(1, 3, 64)
    interface = AttentionInterface()["kvpolicy"]
    turned = MODEL.model.rotary_emb(states, torch.arange(3)[None])

    def changed(module, query, key, value, mask, **kwargs):
        return interface(module, query, key, value, mask, **{**kwargs, name: entry.value})

    with attach(MODEL, PIPELINE) as attached:
        cache = attached.new_cache()
        AttentionInterface.register("kvpolicy", changed)
        try:
            with pytest.raises(UnsupportedError, match=f"^{entry.says or name}"):
                attention(states, position_embeddings=turned, past_key_values=cache)
        finally:
            AttentionInterface.register("kvpolicy", interface)


@pytest.mark.parametrize("name", [n for n, e in ATTENTION.items() if isinstance(e, Refused)])
def test_refused_as_a_keyword_of_the_forward(name):
    """Where transformers hands it on to the attention function."""
    entry = ATTENTION[name]
    if name in ("dropout", "scaling"):
        pytest.skip("transformers' models give these themselves")
    with attach(MODEL, PIPELINE) as attached:
        cache = attached.new_cache()
        with pytest.raises(UnsupportedError, match=f"^{entry.says or name}"):
            MODEL(IDS, past_key_values=cache, **{name: entry.value})
        assert cache.state is None


def test_tests_that_entries_name_exist():
    here = Path(__file__).parent
    for table in (*TABLES.values(), OTHER_FORWARDS):
        for name, entry in table.items():
            if isinstance(entry, Elsewhere):
                file, function = entry.test.split("::")
                tree = ast.parse((here / file).read_text())
                assert function in {getattr(n, "name", None) for n in tree.body}, name
