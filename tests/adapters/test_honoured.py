"""Small arguments of forwards and generate: what comes out is what transformers gives."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.rule.tiny import tiny_config, tiny_model
from tests.support.adapters.models import prompt, tiny

PIPELINE = CachePipeline(window=5)
IDS = prompt([9])["input_ids"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
SCORED = GREEDY | {"return_dict_in_generate": True, "output_scores": True}


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_base_model_without_a_cache(llama, as_tuple):
    """Neither as an attribute nor as an item."""
    options = {"use_cache": False, "output_hidden_states": True, "return_dict": not as_tuple}
    plain = llama.model(IDS, **options)
    with attach(llama.model, PIPELINE):
        ours = llama.model(IDS, **options)
    if as_tuple:
        assert [type(part) for part in ours] == [type(part) for part in plain]
    else:
        assert list(ours) == list(plain) and ours.past_key_values is None


@torch.no_grad()
def test_question_answering_heads():
    """Their logits of one token are one number, which has no spread."""
    torch.manual_seed(0)
    model = transformers.LlamaForQuestionAnswering(tiny().config).eval()
    plain = model(IDS)
    with attach(model, PIPELINE):
        ours = model(IDS)
    assert torch.allclose(ours.start_logits, plain.start_logits, atol=1e-5)
    assert torch.allclose(ours.end_logits, plain.end_logits, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bart", "bert"])
@torch.no_grad()
def test_cross_attention(name):
    config = tiny_config(name)
    config.add_cross_attention = True
    model = tiny_model(name) if name == "bart" else transformers.AutoModelForCausalLM.from_config(
        config
    ).eval()  # fmt: skip
    other = torch.randn(1, 5, config.hidden_size)
    with attach(model, PIPELINE) as attached:
        cache = attached.new_cache()
        for call in (model, model.generate):
            with pytest.raises(UnsupportedError, match=r"^encoder_hidden_states: "):
                call(IDS % 60, encoder_hidden_states=other, past_key_values=cache)
        assert cache.state is None and cache.phase == "prompt"


@torch.no_grad()
def test_keys_and_values_of_shared_layers():
    model = tiny_model("gemma4_text")
    with attach(model, PIPELINE):
        with pytest.raises(UnsupportedError, match=r"^return_shared_kv_states: "):
            model(IDS % 60, return_shared_kv_states=True)
        model(IDS % 60, return_shared_kv_states=False)


def test_narrow_ids(llama):
    plain = llama.generate(IDS.int(), **GREEDY)
    with attach(llama, PIPELINE):
        ours = llama.generate(IDS.int(), **GREEDY)
    assert ours.dtype == plain.dtype and torch.equal(ours, plain)


def test_layers_that_stop_being_causal(llama):
    layer = llama.model.layers[1].self_attn
    with attach(llama, PIPELINE):
        layer.is_causal = False
        try:
            with pytest.raises(UnsupportedError, match=r"^is_causal=False: "):
                llama(IDS)
        finally:
            layer.is_causal = True
        llama(IDS)


@pytest.mark.parametrize("kind", ["WatermarkingConfig", "dict"])
def test_a_watermark_of_the_models_own_config(llama, kind):
    """As an object, or as a file has it."""
    own, marks = llama.generation_config, transformers.WatermarkingConfig(bias=30.0)
    bare = llama.generate(IDS, **GREEDY)
    llama.generation_config = transformers.GenerationConfig(pad_token_id=0)
    llama.generation_config.watermarking_config = marks.to_dict() if kind == "dict" else marks
    try:
        plain = llama.generate(IDS, **GREEDY)
        assert not torch.equal(plain, bare)
        with attach(llama, PIPELINE):
            assert torch.equal(llama.generate(IDS, **GREEDY), plain)
    finally:
        llama.generation_config = own


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("ernie", "task_type_ids"),
        ("roc_bert", "input_shape_ids"),
        ("roc_bert", "input_pronunciation_ids"),
        ("bart", "encoder_attention_mask"),  # without what it masks it says nothing
    ],
)
@torch.no_grad()
def test_inputs_of_other_forwards(name, argument):
    config = tiny_config(name)
    config.use_task_id = True
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids, given = IDS % 60, {argument: torch.ones_like(IDS)}
    plain = model(ids, **given).logits
    assert argument == "encoder_attention_mask" or not torch.allclose(plain, model(ids).logits)
    with attach(model, PIPELINE):
        assert torch.allclose(model(ids, **given).logits, plain, atol=1e-4)


@torch.no_grad()
def test_inputs_of_layers():
    model = tiny_model("gemma4_text")
    ids = IDS % 60
    width = model.config.hidden_size_per_layer_input
    if not width:
        pytest.skip("this transformers' tiny Gemma 4 has none")
    given = torch.randn(1, 9, model.config.num_hidden_layers, width)
    options = {"inputs_embeds": model.get_input_embeddings()(ids), "per_layer_inputs": given}
    plain = model(**options).logits
    with attach(model, PIPELINE):
        assert torch.allclose(model(**options).logits, plain, atol=1e-3)


@torch.no_grad()
def test_return_dict_none(llama):
    """It means what the config says."""
    with attach(llama.model, PIPELINE):
        assert isinstance(llama.model(IDS, return_dict=None), transformers.utils.ModelOutput)
        llama.model.config.return_dict = False
        try:
            assert isinstance(llama.model(IDS, return_dict=None), tuple)
        finally:
            llama.model.config.return_dict = True


def alike(one, other):
    pairs = zip(one.scores, other.scores, strict=True)
    return all(torch.allclose(x, y, atol=1e-4) for x, y in pairs)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama"])
def test_padded_negative_prompts(name):
    """The unconditional branch counts columns, the other one real tokens."""
    model = tiny_model(name)
    inputs, negative = ({k: v % 60 for k, v in prompt(n).items()} for n in ([9, 7], [6, 4]))
    more = SCORED | {
        "negative_prompt_ids": negative["input_ids"], "guidance_scale": 1.7,
        "negative_prompt_attention_mask": negative["attention_mask"],
    }  # fmt: skip
    plain = model.generate(**inputs, **more)
    with attach(model, PIPELINE):
        assert alike(model.generate(**inputs, **more), plain)


class Asks(transformers.LogitsProcessor):
    """Generates with the same model while another generate runs."""

    def __init__(self, model):
        self.model = model

    def __call__(self, ids, scores):
        self.model.generate(IDS % 60, **GREEDY)
        return scores


def test_a_generate_inside_a_guided_one():
    model, inputs = tiny_model("gpt2"), {k: v % 60 for k, v in prompt([9, 7]).items()}
    negative = {f"negative_prompt_{k.removeprefix('input_')}": v for k, v in inputs.items()}
    more = SCORED | {"logits_processor": [Asks(model)], "guidance_scale": 1.7, **negative}
    plain = model.generate(**inputs, **more)
    with attach(model, PIPELINE):
        assert alike(model.generate(**inputs, **more), plain)


def derivative(model, embeds):
    with torch.autograd.forward_ad.dual_level():
        model(inputs_embeds=torch.autograd.forward_ad.make_dual(embeds, embeds))


TRANSFORMS = {
    "forward_ad": derivative,
    "jvp": lambda m, x: torch.func.jvp(lambda e: m(inputs_embeds=e).logits, (x,), (x,)),
    "grad": lambda m, x: torch.func.grad(lambda e: m(inputs_embeds=e).logits.sum())(x),
    "vmap": lambda m, x: torch.func.vmap(lambda e: m(inputs_embeds=e).logits)(x[None]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@torch.no_grad()
def test_transforms_are_refused(llama, name):
    embeds = llama.get_input_embeddings()(IDS)
    with attach(llama, PIPELINE) as attached:
        plain = llama(IDS).logits
        with pytest.raises(UnsupportedError, match=r"^torch\.func, forward_ad: "):
            TRANSFORMS[name](llama, embeds)
        assert torch.equal(llama(IDS).logits, plain), "later forwards are served"
        assert attached.cache is None


@torch.no_grad()
def test_make_fx_is_refused(llama):
    made = torch.fx.experimental.proxy_tensor.make_fx(lambda ids: llama(ids).logits)
    with attach(llama, PIPELINE), pytest.raises(UnsupportedError, match="^trace: "):
        made(IDS)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2}])
def test_more_rows_than_a_cache_that_saw_padding_has(llama, options):
    inputs, more = prompt([9, 5]), {"do_sample": "num_beams" not in options, "max_new_tokens": 2}
    turn = {k: torch.cat([v, torch.ones_like(v[:, :3])], 1) for k, v in inputs.items()}
    with attach(llama, PIPELINE) as attached:
        cache = attached.read(**inputs)
        with pytest.raises(ValueError, match="^input_ids: the cache holds 2 sequences, got"):
            llama.generate(**turn, past_key_values=cache, **more, **options)
        assert cache.columns == 9


def test_a_call_that_transformers_refuses_begins_no_prompt(llama):
    with attach(llama, PIPELINE) as attached:
        cache = attached.read(IDS)
        turn = torch.cat([IDS, IDS[:, :3]], 1)
        with pytest.raises(ValueError, match="unheard_of"):
            llama.generate(turn, past_key_values=cache, unheard_of=1, **GREEDY)
        assert cache.phase == "decode" and cache.columns == 9
        assert llama.generate(turn, past_key_values=cache, **GREEDY).shape == (1, 17)
