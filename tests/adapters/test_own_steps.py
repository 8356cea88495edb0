"""Arguments that every decode step takes, methods of a model's own, and caches it puts aside."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import transformers
from transformers import GenerationMixin

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.continuations import continued
from kvpolicy.adapters.hf.own_steps import LOOP, METHODS
from kvpolicy.adapters.hf.rule.tiny import tiny_config, tiny_model
from tests.support.adapters.faults import digest
from tests.support.adapters.models import SIZES, error, pipelines, prompt, tiny

PIPELINE = CachePipeline(window=5)
IDS = torch.randint(20, 60, (2, 12), generator=torch.Generator().manual_seed(2))
KINDS = (torch.arange(12) > 4).long().expand(2, -1)  # of tokens
GREEDY = {
    "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "bert", "ernie", "data2vec-text"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_kinds_of_tokens(name, padded):
    model = tiny_model(name)
    if name == "data2vec-text" and model.config.type_vocab_size < 2:
        pytest.skip("it has one kind of tokens")
    mask = torch.ones_like(IDS)
    mask[1, : 3 * padded] = 0
    options = {**GREEDY, "attention_mask": mask, "token_type_ids": KINDS}
    plain = model.generate(IDS, **options)
    assert error(plain, model.generate(IDS, **{**options, "token_type_ids": None})) > 0.1
    with attach(model, PIPELINE, **SIZES) as attached:
        ours = model.generate(IDS, **options)
        assert error(ours, plain) < 1e-3
        assert attached.decoding == "eager: token_type_ids: every step takes it"
        model.generate(IDS, **GREEDY)
        assert "token_type_ids" not in attached.decoding
        cache = attached.read(IDS[:, :8], mask[:, :8])
        if name == "gpt2":  # positions and kinds of the context are those of zeros
            return
        said = attached.ask(cache, IDS[:, 8:], token_type_ids=KINDS[:, 8:], **GREEDY)
        assert error(said, attached.ask(cache, IDS[:, 8:], **GREEDY)) > 1e-2


@torch.no_grad()
def test_the_language_of_every_step():
    config = tiny_config("xmod", languages=["en_XX", "de_DE"], default_language="en_XX")
    torch.manual_seed(0)
    model = transformers.XmodForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "adapter_modules" in name:
            weight.normal_(0, 0.3)
    languages = torch.ones(2, dtype=torch.long)
    plain = model.generate(IDS, lang_ids=languages, **GREEDY)
    assert error(plain, model.generate(IDS, **GREEDY)) > 1e-2
    with attach(model, PIPELINE) as attached:
        assert error(model.generate(IDS, lang_ids=languages, **GREEDY), plain) < 1e-4
        assert attached.decoding.startswith("eager: lang_ids")


class Shifted(transformers.LlamaForCausalLM):
    """Takes an argument of its own in each forward."""

    def forward(self, *args, shift=None, **kwargs):
        output = super().forward(*args, **kwargs)
        if shift is not None:
            output.logits = output.logits.roll(shift, -1)
        return output


class Prepared(transformers.LlamaForCausalLM):
    """Positions of its own, of prompt and steps."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["position_ids"] = inputs["position_ids"] * 3
        return inputs


class Updated(Shifted):
    """A step sees what earlier ones put out."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        model_kwargs["shift"] = int(outputs.logits[-1, -1].argmax()) % 5
        return model_kwargs


class Same(transformers.LlamaForCausalLM):
    """Positions that are the library's, which nobody can know beforehand."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs)


class Placed(transformers.LlamaForCausalLM):
    """Positions of its own, of the prompt; steps count on."""

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        return 2 * super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)


class Sampled(transformers.LlamaForCausalLM):
    def _sample(self, input_ids, *args, **kwargs):
        return input_ids


class Stopped(transformers.LlamaForCausalLM):
    def _has_unfinished_sequences(self, *args, **kwargs):
        return False


def made(kind):
    plain = tiny()
    model = kind(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize("eos", [None, 7])
@pytest.mark.parametrize(
    ("kind", "more"), [(Shifted, {"shift": 3}), (Prepared, {}), (Updated, {}), (Placed, {})]
)  # fmt: skip
@torch.no_grad()
def test_models_with_methods_of_their_own(kind, more, eos):
    if kind is Placed and not hasattr(GenerationMixin, "_prepare_position_ids_for_generation"):
        pytest.skip("this transformers has no such method")
    model, inputs = made(kind), prompt([12, 9])
    first = tiny().generate(**inputs, **GREEDY)
    eos = eos and int(model.generate(**inputs, **more, **GREEDY).sequences[0, 14])
    options = {**inputs, **more, **GREEDY, "eos_token_id": eos}
    plain = model.generate(**options)
    assert eos or error(plain, first) > 0.1
    with attach(model, PIPELINE, **SIZES):
        found = model.generate(**options)
        assert torch.equal(found.sequences, plain.sequences)
        pairs = zip(found.logits[: 3 if eos else 6], plain.logits, strict=False)
        assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-3
    beams = model.generate(**{**options, "num_beams": 2}).sequences
    with attach(model, PIPELINE):
        assert torch.equal(model.generate(**{**options, "num_beams": 2}).sequences, beams)


@pytest.mark.parametrize("kind", [Sampled, Stopped])
@torch.no_grad()
def test_a_loop_of_the_models_own(kind):
    model = made(kind)
    name = next(n for n in LOOP if n in vars(kind))
    with attach(model, PIPELINE) as attached:
        cache = attached.new_cache()
        wanted = rf"^{name}: {kind.__name__} decodes by a loop"
        with pytest.raises(UnsupportedError, match=wanted):
            model.generate(IDS, past_key_values=cache, **GREEDY)
        assert cache.state is None and cache.phase == "prompt"


MODES = ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2})
# Whose answer changes no number: which cache transformers would make, and whether it compiles.
INERT = {"_supports_default_dynamic_cache", "_valid_auto_compile_criteria"}


def methods_that_generate_calls():
    """Of the model, through all loops; those that call nothing are among them."""
    found, todo = set(), ["generate", "_sample", "_beam_search", "_assisted_decoding"]
    while todo:
        name = todo.pop()
        method = inspect.getattr_static(GenerationMixin, name, None)
        if name in found or not callable(getattr(transformers.LlamaForCausalLM, name, None)):
            continue
        found.add(name)
        if method is not None:
            source = inspect.getsource(getattr(method, "__func__", method))
            todo += re.findall(r"\bself\.(\w+)\(", source)
    return sorted(found - {"generate"})


def overriding(name, calls):
    """A model whose own method `name` says that it is called."""
    plain = inspect.getattr_static(transformers.LlamaForCausalLM, name)
    kind = type(plain) if isinstance(plain, staticmethod | classmethod) else None
    function = plain.__func__ if kind else plain

    # Keywords by another name than transformers' own, by which it tells what a model takes.
    def own(*args, **given):
        calls.append(name)
        return function(*args, **given)

    return made(
        type("Overriding", (transformers.LlamaForCausalLM,), {name: (kind or (lambda f: f))(own)})
    )


@pytest.mark.parametrize("name", methods_that_generate_calls())
@torch.no_grad()
def test_every_method_that_generate_calls(name):
    """One that a model overrides is called when plain generate calls it, or refused by name."""
    calls = []
    model, ids = overriding(name, calls), IDS[:1].repeat(1, 2)
    for mode in MODES:
        options = {**GREEDY, **mode, "max_new_tokens": 4}
        calls.clear()
        plain, wanted = model.generate(ids, **options).sequences, bool(calls)
        with attach(model, PIPELINE, **SIZES) as attached:
            calls.clear()
            if name in LOOP and wanted and not mode:
                cache = attached.new_cache()
                with pytest.raises(UnsupportedError, match=f"^{name}: Overriding decodes by a"):
                    model.generate(ids, past_key_values=cache, **options)
                assert cache.state is None
                continue
            assert torch.equal(model.generate(ids, **options).sequences, plain)
            assert bool(calls) == wanted or name in INERT


def test_methods_that_generate_calls_are_found():
    found = set(methods_that_generate_calls())
    assert {*LOOP, *METHODS, *INERT, "_prefill", "_optimize_model_for_decode"} <= found
    assert {
        "_prepare_generation_config",
        "_get_logits_processor",
        "_update_finished_beams",
    } <= found


class Configured(transformers.LlamaForCausalLM):
    """Prepares another config than its caller's."""

    changes: dict

    def _prepare_generation_config(self, *args, **kwargs):
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        for name, value in self.changes.items():
            setattr(config, name, value)
        return config, model_kwargs


@pytest.mark.parametrize(
    "changes", [{"num_beams": 2}, {"output_attentions": True}, {"guidance_scale": 1.5}]
)
@torch.no_grad()
def test_a_config_that_the_model_prepares(changes):
    model = made(Configured)
    model.changes = {"max_new_tokens": 3, "max_length": 15}
    plain = model.generate(IDS, **GREEDY).sequences
    with attach(model, PIPELINE, **SIZES) as attached:
        assert torch.equal(model.generate(IDS, **GREEDY).sequences, plain)
        model.changes, cache = changes, attached.new_cache()
        with pytest.raises(UnsupportedError, match=f"^{min(changes)}: Configured hands "):
            model.generate(IDS, past_key_values=cache, **GREEDY)
        assert cache.state is None


@torch.no_grad()
def test_a_criterion_of_whole_numbers():
    """transformers reads their last bit."""
    model = tiny()
    for done in (torch.int32, torch.uint8, torch.long):
        stop = [lambda ids, scores, d=done, **_: torch.full(ids.shape[:1], ids.shape[1] > 14).to(d)]
        plain = model.generate(IDS, stopping_criteria=stop, **GREEDY).sequences
        assert plain.shape[1] == 15
        with attach(model, PIPELINE, **SIZES):
            assert torch.equal(
                model.generate(IDS, stopping_criteria=stop, **GREEDY).sequences, plain
            )


def test_a_return_dict_of_none_is_the_configs():
    model = tiny().model
    with attach(model, PIPELINE, **SIZES), torch.no_grad():
        assert model(IDS, return_dict=None).last_hidden_state.shape[:2] == IDS.shape
        assert isinstance(model(IDS, return_dict=False), tuple)


@torch.no_grad()
def test_a_cache_of_other_rows_beside_beams():
    model, inputs = tiny(), prompt([12, 9])
    with attach(model, PIPELINE, **SIZES) as attached:
        cache = attached.read(**inputs)
        before, ids = digest(cache), torch.cat([inputs["input_ids"], IDS], 1)
        for more in ({"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}):
            with pytest.raises(
                ValueError, match="^input_ids: the cache holds 2 sequences, got a b"
            ):
                model.generate(ids, past_key_values=cache, **{**GREEDY, **more})
            assert digest(cache) == before


@torch.no_grad()
def test_policies_act_in_steps_that_the_model_prepares():
    inputs = prompt([33, 21])
    for name in ("snapkv", "all"):
        kept = []
        for model in (tiny(), made(Same)):
            with attach(model, pipelines()[name], **SIZES) as attached:
                out = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 12})
                cache = out.past_key_values
                kept.append([cache.state.kept(1, r, h).tolist() for r in (0, 1) for h in (0, 1)])
                kept.append(out.sequences.tolist())
                assert ("own" in attached.decoding) == (type(model) is Same)
        assert kept[0] == kept[2] and kept[1] == kept[3]


MOST = 16  # columns, after which phi3's RoPE changes
LONG = torch.randint(20, 60, (1, 24), generator=torch.Generator().manual_seed(4))


@pytest.fixture(params=["phi3", "phimoe"])
def phi(request):
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 8.0]}
    mscale = {"short_mscale": 1.0, "long_mscale": 1.0} if request.param == "phimoe" else {}
    config = transformers.AutoConfig.for_model(
        request.param, vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, max_position_embeddings=128, original_max_position_embeddings=MOST,
        initializer_range=0.3, sliding_window=None,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4,
            "original_max_position_embeddings": MOST, **factors, **mscale,
        },
    )  # fmt: skip
    if request.param == "phimoe":
        config.num_local_experts = 2
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
@torch.no_grad()
def test_caches_that_a_model_puts_aside(phi, mode):
    options = {**GREEDY, **mode}
    served = ((LONG, 6), (LONG[:, :9], 7))  # all above, all below
    plain = [phi.generate(ids, **{**options, "max_new_tokens": n}) for ids, n in served]
    with attach(phi, PIPELINE, **SIZES) as attached:
        assert attached.put_aside == MOST
        for (ids, n), wanted in zip(served, plain, strict=True):
            cache = attached.new_cache()
            found = phi.generate(
                ids, **{**options, "max_new_tokens": n}, past_key_values=cache
            )  # fmt: skip
            assert torch.equal(found.sequences, wanted.sequences)
            assert error(found, wanted) < 1e-3 and found.past_key_values is cache
            assert cache.columns == wanted.past_key_values.get_seq_length()
        cache = attached.read(LONG[:, :9])
        before = digest(cache)
        for call in (
            lambda: phi.generate(LONG[:, :12], **options),
            lambda: phi.generate(LONG, past_key_values=cache, **options),
            lambda: attached.ask(cache, LONG[:, 9:], **options),
            lambda: attached.read(LONG[:, 9:], cache=cache),
            lambda: attached.loglikelihood(LONG[:, :9], LONG[:, 9:]),
            lambda: continued(attached, [((*range(20, 30),), (*range(30, 40),))]),
        ):
            says = r"^past_key_values: (prepare_inputs_for_|assisted d)"
            with pytest.raises(UnsupportedError, match=says):
                call()
            assert digest(cache) == before


class Streams:
    """Asks the model when it gets the prompt."""

    def __init__(self, ask):
        self.ask = ask

    def put(self, value):
        if value.ndim > 1:
            self.ask()

    def end(self):
        pass


@torch.no_grad()
def test_who_asks_before_a_cache_is_put_aside(phi):
    """The generation's own forward comes without a cache there, as what a streamer asks does."""
    plain = phi.generate(LONG, **GREEDY).sequences
    with attach(phi, PIPELINE, **SIZES) as attached:
        for ask in (
            lambda: phi(LONG),
            lambda: phi.model(IDS[:1]),
            lambda: phi.generate(LONG[:, :20], max_new_tokens=2),
            lambda: attached.loglikelihood(IDS[:1, :5], IDS[:1, 5:9]),
        ):
            for mode in ({}, {"prompt_lookup_num_tokens": 2}):
                cache = attached.new_cache()
                options = {**GREEDY, **mode, "past_key_values": cache, "streamer": Streams(ask)}
                assert torch.equal(phi.generate(LONG, **options).sequences, plain)
                assert mode or cache.columns == plain.shape[1] - 1
