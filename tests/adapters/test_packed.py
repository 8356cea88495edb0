"""Several texts in one row: each is served for itself, or the row is refused."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.faults import digest
from tests.support.adapters.models import SIZES, pipelines, prompt

PIPELINE = CachePipeline(window=5)
IDS = torch.cat([prompt([20])["input_ids"], prompt([20], seed=2)["input_ids"]])
LENGTHS = [[7, 13], [4, 5, 11]]  # of the texts in each row
FLAT = [n for row in LENGTHS for n in row]
PLACES = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
BOUNDS = {
    "cu_seq_lens_q": torch.tensor([0, *FLAT]).cumsum(0),
    "cu_seq_lens_k": torch.tensor([0, *FLAT]).cumsum(0),
    "max_length_q": 13,
    "max_length_k": 13,
    "seq_idx": torch.tensor([[0] * 7 + [1] * 13, [0] * 4 + [1] * 5 + [2] * 11]),
}


def apart(model):
    """Logits of each text run for itself."""
    parts = [text for row, cut in zip(IDS, LENGTHS, strict=True) for text in row.split(cut)]
    found = [model(text[None], use_cache=False).logits[0] for text in parts]
    return torch.cat(found).view(2, 20, -1)


@pytest.mark.parametrize("name", [None, "striped", "quest", "snapkv", "gate"])
def test_texts_do_not_see_each_other(model, name):
    if name is None:
        wanted = apart(model)
        plain = model(IDS, position_ids=PLACES, use_cache=False).logits
        assert (plain - wanted).abs().max() < 1e-4
        assert (model(IDS, use_cache=False).logits - wanted).abs().max() > 0.1
    with attach(model, pipelines()[name] if name else PIPELINE, **SIZES) as attached:
        attached.forwards.warned = True
        if name:
            wanted = apart(model)
        output = model(IDS, position_ids=PLACES, use_cache=False)
        assert (output.logits - wanted).abs().max() < 1e-4
        assert output.past_key_values is None
        assert len(attached.last_report().evicted) == 2


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(llama, name):
    """What collators pass on beside position ids says the same, and is held to it."""
    wanted = apart(llama)
    given = {name: BOUNDS[name], "use_cache": False}
    with attach(llama, PIPELINE) as attached:
        ours = llama(IDS, position_ids=PLACES, **given).logits
        assert (ours - wanted).abs().max() < 1e-4
        other = BOUNDS[name] + 1 if name.startswith("max") else BOUNDS[name].clone()
        if name == "seq_idx":
            other[0, 9:] += 1
        elif name.startswith("cu"):
            other[1] += 1
        with pytest.raises(ValueError, match=name):
            llama(IDS, position_ids=PLACES, **{**given, name: other})
        for more in ({"past_key_values": attached.new_cache()}, {"attention_mask": IDS > 0}):
            with pytest.raises(UnsupportedError, match=f"^({name}|position_ids)"):
                llama(IDS, position_ids=PLACES, **{**given, **more})
        with pytest.raises(UnsupportedError, match=f"^{name}: bounds of packed texts"):
            llama(IDS, **given)  # which only some attention functions of transformers read


def test_with_a_cache(llama):
    with attach(llama, PIPELINE) as attached:
        cache = attached.new_cache()
        llama(IDS, past_key_values=cache)
        before = digest(cache)
        for options in ({"past_key_values": cache}, {"use_cache": True}, {}):
            with pytest.raises(UnsupportedError, match="^position_ids.*use_cache=False"):
                llama(IDS, position_ids=PLACES, **options)
        assert digest(cache) == before


def test_generate_never_packs(llama):
    """Where transformers makes a mask of its own (5.17) a row is one text at these positions."""
    options = {"position_ids": PLACES, "max_new_tokens": 3, "do_sample": False}
    plain = llama.generate(IDS, **options)
    with attach(llama, PIPELINE):
        try:
            assert torch.equal(llama.generate(IDS, **options), plain)
        except UnsupportedError as error:
            assert str(error).startswith("position_ids")
