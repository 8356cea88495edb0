"""LoRA adapters of PEFT: what attaches is the wrapped model, what decides is the merged one."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.faults import snapshot
from tests.support.adapters.models import SIZES, error, pipelines, prompt, tiny

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # asked for by PEFT
    "ignore:Position ids are not supported:UserWarning",  # transformers hands them to PEFT
)

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TARGETS = ["q_proj", "k_proj", "v_proj"]


def lora(kind="llama"):
    """A tiny model with adapters that change what it says, keys before RoPE included."""
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(5)
    return peft.get_peft_model(tiny(kind), config).eval()


def run(model, pipeline=None, **options):
    """12 greedy tokens for two padded prompts, with their logits, attached or plain."""
    inputs = prompt([33, 21])
    if pipeline is None:
        return model.generate(**inputs, max_new_tokens=12, **GREEDY, **options)
    with attach(model, pipeline, **SIZES) as attached:
        cache = attached.new_cache()
        out = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=12, **GREEDY, **options
        )
    return out, [cache.state.kept(x, r, h).tolist() for x in (0, 1) for r in (0, 1) for h in (0, 1)]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_neutral_is_the_plain_wrapped_model(kind):
    model = lora(kind)
    with model.disable_adapter():
        base = run(model)
    plain = run(model)
    assert error(plain, base) > 0.1, "the adapters change nothing"
    before = snapshot(model.get_base_model()), dict(model.__dict__)
    out, _ = run(model, CachePipeline(window=5))
    assert torch.equal(out.sequences, plain.sequences)
    assert error(out, plain) < 1e-3
    assert (snapshot(model.get_base_model()), dict(model.__dict__)) == before


@pytest.mark.parametrize("name", ["gate", "all", "gate-quest-snapkv"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_policies_act_as_on_the_merged_model(kind, name):
    """The write gate reads the adapted keys before RoPE."""
    wrapped, kept = run(lora(kind), pipelines()[name])
    merged, wanted = run(lora(kind).merge_and_unload(), pipelines()[name])
    assert torch.equal(wrapped.sequences, merged.sequences)
    assert error(wrapped, merged) < 1e-3
    assert kept == wanted
    assert max(map(len, kept)) < 33 + 12


def test_adapters_may_change_while_attached():
    model = lora()
    model.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    )
    inputs = {**prompt([20]), "max_new_tokens": 6, **GREEDY}
    wanted = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        wanted[name] = model.generate(**inputs)
    assert error(wanted["default"], wanted["other"]) > 0.1
    with attach(model, CachePipeline(window=5)):
        for name, plain in wanted.items():
            model.set_adapter(name)
            assert error(model.generate(**inputs), plain) < 1e-3


def test_generate_of_the_model_inside():
    """It is not the one that was attached, and says so before it runs."""
    model = lora()
    base, inputs = model.get_base_model(), {**prompt([20, 14]), "max_new_tokens": 4, **GREEDY}
    plain = model.generate(**inputs)
    with attach(model, CachePipeline(window=5)):
        before = snapshot(base)
        with pytest.raises(UnsupportedError, match=r"^generate: .*generate of the model that was"):
            base.generate(**inputs)
        assert snapshot(base) == before
        assert error(model.generate(**inputs), plain) < 1e-3
    with attach(base, CachePipeline(window=5)):  # the other way round both are
        for inside in (base, model):
            assert error(inside.generate(**inputs), plain) < 1e-3


def soft(kind, **extra):
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=12, **extra)
    torch.manual_seed(5)
    return peft.get_peft_model(tiny(), config).eval()


SOFT = {"PromptTuning": {}, "PromptEncoder": {"encoder_hidden_size": 16}}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", [None, "quest", "snapkv", "gate-quest-snapkv"])
@pytest.mark.parametrize("kind", SOFT)
def test_a_soft_prompt_is_part_of_the_prompt(kind, name, beams):
    """As if its virtual tokens were embedded by hand: the prompt ends after all of it."""
    model = soft(kind, **SOFT[kind])
    base, ids = model.get_base_model(), prompt([33])["input_ids"]
    whole = torch.cat([model.get_prompt(1), base.get_input_embeddings()(ids)], 1)
    pipeline = pipelines()[name] if name else CachePipeline(window=5)
    options = {"max_new_tokens": 6, "num_beams": beams, **GREEDY}
    with attach(model, pipeline, **SIZES):
        ours = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    with attach(base, pipeline, **SIZES):
        wanted = base.generate(inputs_embeds=whole, **options)
    assert error(ours, wanted) < 1e-4
    mine, theirs = ours.past_key_values.report(), wanted.past_key_values.report()
    assert mine.evicted == theirs.evicted
    if name is None:
        assert error(ours, model.generate(input_ids=ids, **options)) < 1e-4


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", SOFT)
def test_padding_after_a_soft_prompt(kind, beams):
    """PEFT counts its columns, where transformers counts tokens."""
    model, inputs = soft(kind, **SOFT[kind]), prompt([33, 21])
    options = {**inputs, "max_new_tokens": 6, "num_beams": beams, **GREEDY}
    plain, forward = model.generate(**options), model(**inputs).logits
    with attach(model, CachePipeline(window=5), **SIZES):
        assert error(model.generate(**options), plain) < 1e-3
        far = (model(**inputs).logits - forward).abs()[:, 12:][inputs["attention_mask"].bool()]
        assert far.max() < 1e-3


def test_a_soft_prompt_is_read():
    model, context = soft("PromptTuning"), prompt([33])
    with attach(model, pipelines()["snapkv"], **SIZES) as attached:
        cache = attached.read(**context)
        assert cache.columns == 45 and cache.report().evicted[0][0] > 0
        with pytest.raises(UnsupportedError, match="soft prompt"):
            attached.read(**context, chunk_size=4)
        for name, value in (("prompt_lookup_num_tokens", 3), ("assistant_model", tiny())):
            with pytest.raises(UnsupportedError, match=f"^{name}: not with a soft prompt"):
                model.generate(input_ids=context["input_ids"], **{name: value})
        with pytest.raises(UnsupportedError, match="^prefill_chunk_size: not with a soft prompt"):
            model.generate(input_ids=context["input_ids"], prefill_chunk_size=8)


def test_ready_keys_and_values_are_refused():
    model = soft("PrefixTuning")
    before = snapshot(model.get_base_model()), dict(model.__dict__)
    with pytest.raises(UnsupportedError, match="^peft_type PREFIX_TUNING"):
        attach(model, CachePipeline(window=5))
    assert (snapshot(model.get_base_model()), dict(model.__dict__)) == before
    model = lora()
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with attach(model, CachePipeline(window=5)):
        model.peft_config["prefix"] = prefix
        model.active_adapter = "prefix"
        with pytest.raises(UnsupportedError, match="^peft_type PREFIX_TUNING"):
            model.generate(**prompt([9]), max_new_tokens=2)


@pytest.mark.parametrize("by_position", [False, True])
def test_an_adapter_that_looks_for_its_tokens_among_the_ids(by_position):
    """aLoRA, which finds ids by position or by the name input_ids."""
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS, alora_invocation_tokens=[9, 8], task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(5)
    model = peft.get_peft_model(tiny(), config).eval()
    ids = torch.tensor([[30, 31, 32, 33, 34, 9, 8, 40, 41, 42]])

    def run():
        args, named = ((ids,), {}) if by_position else ((), {"input_ids": ids})
        out = model.generate(*args, **named, max_new_tokens=6, eos_token_id=None, **GREEDY)
        return torch.cat(out.logits)

    plain = run()
    with model.disable_adapter():
        assert not torch.allclose(run(), plain, atol=1e-2)
    with attach(model, CachePipeline(window=5), **SIZES):
        assert torch.allclose(run(), plain, atol=1e-4)
