"""Masks against what a cache holds: equal to before, longer, shorter, hiding."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from tests.support.adapters.faults import digest
from tests.support.adapters.models import SIZES, error, pipelines, prompt

PIPELINE = CachePipeline(window=5)
GREEDY = {
    "max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip


def test_a_mask_that_hides_what_the_cache_holds(llama):
    inputs = prompt([33, 21])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with attach(llama, PIPELINE, **SIZES) as attached:
        cache = attached.new_cache()
        llama(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
        before = digest(cache)
        hides = mask.clone()
        hides[0, 3] = 0
        for run in (
            lambda: llama(ids[:, 20:], attention_mask=hides, past_key_values=cache),
            lambda: llama.generate(
                ids, attention_mask=hides, past_key_values=cache, max_new_tokens=2
            ),
        ):
            with pytest.raises(UnsupportedError, match="^attention_mask: it hides columns"):
                run()
            assert digest(cache) == before
        same = llama(ids[:, 20:], attention_mask=mask, past_key_values=cache.fork()).logits
        alone = llama(ids[:, 20:], attention_mask=mask[:, 20:], past_key_values=cache.fork()).logits
        assert torch.equal(same, alone)
        with pytest.raises(ValueError, match="attention_mask: wanted"):
            llama(ids[:, 20:], attention_mask=mask[:, 5:], past_key_values=cache)


def test_a_mask_that_shows_what_the_cache_does_not_hold(llama):
    """Columns that an earlier mask hid, or that came after a row had ended."""
    inputs, more = prompt([20, 11]), prompt([5, 5], seed=4)["input_ids"]
    with attach(llama, PIPELINE, **SIZES) as attached:
        cache = attached.new_cache()
        llama(**inputs, past_key_values=cache)
        ids, before = torch.cat([inputs["input_ids"], more], 1), digest(cache)
        for run in (
            lambda **given: llama(more, past_key_values=cache.fork(), **given),
            lambda **given: llama.generate(
                ids, past_key_values=cache.fork(), max_new_tokens=2, **given
            ),
        ):
            with pytest.raises(UnsupportedError, match="^attention_mask: it shows columns"):
                run(attention_mask=torch.ones_like(ids))
            run(attention_mask=torch.cat([cache.real(), torch.ones_like(more)], 1))
        assert digest(cache) == before
        out = llama.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        cache.reset()
        llama.generate(
            **inputs, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0,
            eos_token_id=int(out[0, 20]),
        )  # fmt: skip
        assert not cache.real()[0, 21:].any() and cache.real()[1, 20:].all()
        shows = torch.cat([inputs["attention_mask"], torch.ones(2, cache.columns - 15)], 1)
        with pytest.raises(UnsupportedError, match="^attention_mask: it shows columns"):
            llama(more, attention_mask=shows, past_key_values=cache)


def test_without_a_mask_hidden_columns_stay_hidden(llama):
    """Of a next turn by generate, whose default mask would show them."""
    inputs, more = prompt([20, 11]), prompt([5, 5], seed=4)["input_ids"]
    ids = torch.cat([inputs["input_ids"], more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    wanted = llama.generate(ids, attention_mask=mask, **GREEDY)
    with attach(llama, PIPELINE, **SIZES) as attached:
        for given in ({"pad_token_id": 199}, {}, {"attention_mask": mask}):
            cache = attached.new_cache()
            llama(**inputs, past_key_values=cache)
            assert (
                error(llama.generate(ids, past_key_values=cache, **given, **GREEDY), wanted) < 1e-4
            )


@pytest.mark.parametrize("more", [0, 1, 24])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_a_mask_that_is_longer_than_the_prompt(llama, more, mode):
    """The prompt ends where the ids end."""
    ids = prompt([13])["input_ids"].repeat(1, 3)
    mask = torch.ones(1, 39 + more, dtype=torch.long)
    plain = llama.generate(ids, attention_mask=mask, **GREEDY, **mode)
    with attach(llama, PIPELINE, **SIZES):
        assert error(llama.generate(ids, attention_mask=mask, **GREEDY, **mode), plain) < 1e-4
    with attach(llama, pipelines()["snapkv"], **SIZES):
        wanted = llama.generate(ids, attention_mask=mask[:, :39], **GREEDY, **mode)
        found = llama.generate(ids, attention_mask=mask, **GREEDY, **mode)
    assert error(found, wanted) < 1e-4 and found.past_key_values.phase == "decode"
    reports = [out.past_key_values.report().evicted for out in (found, wanted)]
    assert reports[0] == reports[1] and reports[0][0][0] > 0


def test_a_mask_that_is_shorter_than_the_prompt(llama):
    """Also one of ones, which transformers drops before it could notice."""
    ids = prompt([9])["input_ids"]
    with attach(llama, PIPELINE) as attached:
        cache = attached.read(ids)
        more = torch.cat([ids, ids[:, :4]], 1)
        for given, width in ((None, 6), (cache, 6)):
            mask = torch.ones(1, width, dtype=torch.long)
            with pytest.raises(ValueError, match="^attention_mask: wanted"):
                llama.generate(
                    ids if given is None else more, attention_mask=mask, past_key_values=given,
                    max_new_tokens=2,
                )  # fmt: skip


def test_a_mask_that_hides_tokens_to_come(llama):
    ids = prompt([9])["input_ids"]
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 10] = 0
    with attach(llama, PIPELINE), pytest.raises(UnsupportedError, match="tokens to come"):
        llama.generate(ids, attention_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize("name", ["snapkv", "all"])
@pytest.mark.parametrize("whole", [True, False])
def test_new_ids_with_a_mask_of_everything(llama, name, whole):
    """As transformers takes a next turn: all ids, or the new ones beside a mask of all."""
    ids, more = prompt([33])["input_ids"], prompt([12], seed=4)["input_ids"]
    with attach(llama, pipelines()[name], **SIZES) as attached:
        caches = [attached.read(ids) for _ in range(2)]
        mask = torch.ones(1, 45, dtype=torch.long)
        given = torch.cat([ids, more], 1) if whole else more
        out = llama.generate(given, attention_mask=mask, past_key_values=caches[0], **GREEDY)
        caches[1].begin_prompt()
        llama(more, past_key_values=caches[1])
        caches[1].end_prompt()
        token = out.sequences[:, given.shape[1] :][:, :-1]
        for n in range(token.shape[1]):
            llama(token[:, n : n + 1], past_key_values=caches[1])
        assert digest(caches[0])[2:] == digest(caches[1])[2:]


IDS = prompt([9])["input_ids"]
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("masks", [{"full_attention": None}, {"full_attention": LEFT}, {}])
def test_masks_by_kind_of_layer(llama, masks):
    """Whatever an earlier call's mask said: it is that call's."""
    ids = prompt([9])["input_ids"]
    with attach(llama, PIPELINE):
        for before in (None, LEFT):
            llama(ids, attention_mask=before)
            with pytest.raises(UnsupportedError, match="^attention_mask: wanted a 2D mask"):
                llama(ids, attention_mask=masks)


@pytest.mark.parametrize("how", ["wrapped", "hook", "whole"])
def test_a_mask_that_the_attachment_does_not_read(llama, how):
    """Set between its hook and the decoder, as accelerate's hooks do."""
    ids, decoder = prompt([9])["input_ids"], llama.model
    plain, masked = llama(ids).logits, llama(ids, attention_mask=LEFT).logits
    forward, mask = decoder.forward, torch.zeros(1, 1, 9, 9) if how == "whole" else LEFT

    def changed(*args, **kwargs):
        return forward(*args, **{**kwargs, "attention_mask": mask})

    def hook(module, args, kwargs):
        return args, {**kwargs, "attention_mask": LEFT}

    with attach(llama, PIPELINE):
        handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)
        if how != "hook":
            handle.remove()
            decoder.forward = changed
        try:
            with pytest.raises(UnsupportedError, match="^attention_mask: "):
                llama(ids)
            if how != "whole":
                assert torch.allclose(llama(ids, attention_mask=LEFT).logits[:, 3:], masked[:, 3:],
                                      atol=1e-4)  # fmt: skip
        finally:
            handle.remove()
            decoder.__dict__.pop("forward", None)
        assert torch.allclose(llama(ids).logits, plain, atol=1e-4)


PAIR = prompt([9, 6])
REAL = PAIR["attention_mask"]
ONES = torch.ones_like(REAL)
DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
)  # fmt: skip
MASKS = {
    **{str(dtype): REAL.to(dtype) for dtype in DTYPES},
    **{f"ones of {dtype}": ONES.to(dtype) for dtype in DTYPES},
    **{f"{n} for real": REAL * n for n in (2, -1, 0.5)},
    **{f"all {n}": ONES * n for n in (2, -1, 0.5)},
    **{n: torch.where(REAL == 0, 0.0, float(n)) for n in ("nan", "inf")},
    "additive": (1 - REAL) * -1e9, "numbers of texts": REAL * (1 + (torch.arange(9) > 5)),
    "0D": torch.tensor(1), "1D": ONES[0], "rows alone": ONES[:, 0], "3D": ONES[:, None],
    "3D, whole": torch.ones(2, 9, 9).tril(), "4D": torch.ones(2, 1, 9, 9).bool().tril(),
    "4D, added": torch.zeros(2, 1, 9, 9), "5D": torch.ones(2, 1, 1, 9, 9),
    "a list": REAL.tolist(), "of numpy": REAL.numpy(), "a tuple": (REAL,), "True": True, "1": 1,
    "text": "11", "a dict": {}, "sparse": REAL.to_sparse(), "meta": REAL.to("meta"),
    "a row": ONES[:1], "a padded row": REAL[1:], "three rows": torch.ones(3, 9),
    "four rows": torch.ones(4, 9), "no columns": ONES[:, :0], "short": REAL[:, 1:],
    "long": torch.cat([REAL, ONES[:, :3]], 1),
}  # fmt: skip
# Other shapes of ones, which plain transformers drops before it looks at them in some forwards.
SHAPES = ("a row", "three rows", "four rows", "no columns", "short", "1D")
WAYS = {
    "forward": lambda model, **more: model(PAIR["input_ids"], **more).logits * REAL[..., None],
    "generate": lambda model, **more: torch.stack(
        model.generate(PAIR["input_ids"], eos_token_id=None, **GREEDY, **more).logits
    ),
    "beams": lambda model, **more: torch.stack(
        model.generate(PAIR["input_ids"], num_beams=2, **GREEDY, **more).logits
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_mask(llama, way):
    """Equal to plain transformers, or refused by name before the cache has read anything."""
    served = set()
    for name, mask in MASKS.items():
        try:
            plain = WAYS[way](llama, attention_mask=mask)
        except (
            AttributeError,
            IndexError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ):
            plain = None
        with attach(llama, PIPELINE, **SIZES) as attached:
            cache = attached.new_cache()
            kinds = (
                UnsupportedError,
                *((TypeError, ValueError) if plain is None or name in SHAPES else ()),
            )
            try:
                found = WAYS[way](llama, attention_mask=mask, past_key_values=cache)
            except kinds as error:
                assert str(error).startswith("attention_mask: "), name
                assert cache.state is None, name
                continue
        assert plain is not None, name
        assert torch.allclose(found, plain, atol=1e-4), name
        served.add(name)
    assert {str(dtype) for dtype in DTYPES} < served
    assert not any(mark in name for name in served for mark in (" for real", "all ", "nan", "inf"))


def test_masks_where_a_model_makes_masks_around_its_decoder():
    """transformers makes them bool before ours sees them."""
    model, ids = tiny_model("gemma3").eval(), IDS % 60
    plain = model(ids, attention_mask=LEFT * 2).logits
    with attach(model, PIPELINE) as attached:
        cache = attached.new_cache()
        with pytest.raises(UnsupportedError, match="^attention_mask: wanted "):
            model(ids, attention_mask=LEFT[0], past_key_values=cache)
        assert cache.state is None
        found = model(ids, attention_mask=LEFT * 2).logits
    assert torch.allclose(found[:, 3:], plain[:, 3:], atol=1e-4)


def test_numbers_other_than_0_and_1_of_a_negative_prompt(llama):
    guided = {"negative_prompt_ids": IDS, "guidance_scale": 1.7, **GREEDY}
    with attach(llama, PIPELINE) as attached:
        cache = attached.new_cache()
        for mask in (LEFT * 2, LEFT[0], LEFT.tolist()):
            with pytest.raises((TypeError, UnsupportedError), match="^negative_prompt_attention_m"):
                llama.generate(
                    IDS, negative_prompt_attention_mask=mask, past_key_values=cache, **guided
                )
        assert cache.state is None
        llama.generate(IDS, negative_prompt_attention_mask=LEFT.float(), **guided)


def test_generate_after_padding_on_the_right(llama):
    """transformers goes on from a column of padding there."""
    inputs = prompt([12, 9], side="right")
    with attach(llama, PIPELINE) as attached:
        for run in (llama.generate, lambda **more: attached.ask(attached.read(IDS), **more)):
            with pytest.raises(UnsupportedError, match="^attention_mask: it hides a row's last"):
                run(**inputs, max_new_tokens=2)


def test_a_mask_that_pad_tokens_stand_for(llama):
    """transformers infers one from them; it hides the same columns as one that is given."""
    right, left = prompt([12, 9], side="right"), prompt([12, 9])
    plain = llama.generate(left["input_ids"], max_new_tokens=2, do_sample=False)
    with attach(llama, PIPELINE):
        out = llama.generate(left["input_ids"], max_new_tokens=2, do_sample=False)
        assert torch.equal(out, plain)
        with pytest.raises(UnsupportedError, match=r"^attention_mask: .* \(pad_token_id says so"):
            llama.generate(right["input_ids"], max_new_tokens=2)
        unknown = {"pad_token_id": None, "eos_token_id": None}
        assert llama.generation_config.pad_token_id == 0
        llama.generation_config.pad_token_id = None
        try:  # padding becomes tokens
            llama.generate(right["input_ids"], max_new_tokens=2, **unknown)
        finally:
            llama.generation_config.pad_token_id = 0


def test_a_pad_token_that_the_cache_holds_is_a_token(llama):
    """A model may choose its padding token; no mask is inferred that hides it in a next turn."""
    ids = prompt([20])["input_ids"].clone()
    ids[0, 7] = llama.generation_config.pad_token_id
    mask = torch.ones_like(ids)
    with attach(llama, PIPELINE, **SIZES) as attached:
        cache = attached.read(ids[:, :12])
        out = llama.generate(ids, past_key_values=cache.fork(), **GREEDY)
        said = llama.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(out.sequences, said.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(said.logits))
