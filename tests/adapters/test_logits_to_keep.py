"""`logits_to_keep` in forwards and generate: what plain transformers picks, or refused before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.faults import digest
from tests.support.adapters.models import SIZES, prompt

IDS = prompt([9, 9])["input_ids"]
PIPELINE = CachePipeline(window=5)
GREEDY = {"do_sample": False, "eos_token_id": None}
COLUMNS = torch.arange(9)


def mask(*at):
    return torch.isin(COLUMNS, torch.tensor(at))


VALUES = {
    **{str(n): n for n in (0, 1, 3, 9, 12, -1, -3, -20, True, False, None, 1.0)},
    "text": "1", "numpy": np.int64(2), "slice": slice(-2, None), "list": [1, 2], "tuple": (0, -1),
    **{f"[{n}]": torch.tensor([n]) for n in (0, -1, 5, 99, -9, -10, 1.0, True)},
    **{f"0d {n}": torch.tensor(n) for n in (0, -1, 5, 99, True)},
    "[0, -1]": torch.tensor([0, -1]), "int32": torch.tensor([0], dtype=torch.int32),
    "empty": COLUMNS[:0], "mask": mask(6, 7), "mask of all": mask(*range(9)), "no column": mask(),
    "short mask": mask(6)[:8], "rows": torch.tensor([[5], [3]]), "first": torch.tensor([[0], [0]]),
    "far row": torch.tensor([[5], [99]]), "one row": torch.tensor([[5]]),
    "three rows": torch.tensor([[5]] * 3), "mask of rows": torch.stack([mask(2, 3), mask(4)]),
    "short of rows": torch.stack([mask(2, 3), mask(4)])[:, :8], "3d": torch.zeros(2, 1, 1).long(),
    "3d mask": torch.ones(2, 9, 1).bool(),
}  # fmt: skip
NEW = {"max_new_tokens": 3, **GREEDY}
CALLS = {
    "forward": lambda model, **more: model(IDS, **more).logits,
    "by position": lambda model, logits_to_keep, past_key_values=None: (
        model(IDS, None, None, past_key_values, None, None, None, logits_to_keep).logits
    ),
    "embedded": lambda model, **more: (
        model(inputs_embeds=model.model.embed_tokens(IDS), **more).logits
    ),
    "step": lambda model, **more: model(IDS[:, :1], **more).logits,
    "one token": lambda model, **more: model.generate(IDS, **{**NEW, "max_new_tokens": 1}, **more),
    "tokens": lambda model, **more: model.generate(IDS, **NEW, **more),
    "chunks": lambda model, **more: model.generate(IDS, **NEW, prefill_chunk_size=4, **more),
    "beams": lambda model, **more: model.generate(IDS, **NEW, num_beams=2, **more),
    "lookup": lambda model, **more: model.generate(
        IDS[:1].repeat(1, 2), **NEW, prompt_lookup_num_tokens=2, **more
    ),
}


# Of each kind a few that plain transformers serves, and a few that it raises for.
SERVED = {"forward": "-3 None [5] mask slice", "one token": "-3 [5] mask", "tokens": "0 12 [0]"}
RAISES = {
    "forward": "1.0 [99] [-10] text", "one token": "-20 empty", "tokens": "-1 [5] mask",
    "chunks": "[5] mask", "beams": "[5]",
}  # fmt: skip
FEW = "0 3 -1 -20 1.0 [0] [5] [99] empty mask rows first"


def plainly(model, call, value):
    try:
        return CALLS[call](model, logits_to_keep=value)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None


@pytest.mark.parametrize("call", CALLS)
def test_as_plain_transformers_or_refused_before(llama, call):
    """What plain transformers raises for is refused by name, and the cache has read nothing."""
    values = VALUES
    if call in ("chunks", "beams", "lookup"):  # transformers' own loops pick as its others do
        values = {name: VALUES[name] for name in FEW.split()}
    plain = {name: plainly(llama, call, value) for name, value in values.items()}
    assert all(plain[name] is not None for name in SERVED.get(call, "").split())
    assert all(plain[name] is None for name in RAISES.get(call, "").split())
    with attach(llama, PIPELINE, **SIZES) as attached:
        for name, value in values.items():
            given = {"logits_to_keep": value, "past_key_values": attached.new_cache()}
            if plain[name] is not None:
                found = CALLS[call](llama, **given)
                assert found.shape == plain[name].shape, name
                assert torch.allclose(found.float(), plain[name].float(), atol=1e-4), name
                continue
            with pytest.raises((TypeError, ValueError, UnsupportedError), match="^logits_to_keep:"):
                CALLS[call](llama, **given)
            assert given["past_key_values"].state is None, name


def test_what_a_question_picks(llama):
    with attach(llama, PIPELINE, **SIZES) as attached:
        cache = attached.read(IDS)
        before = digest(cache)
        for value in (torch.tensor([5]), torch.tensor([99]), 1.0):
            with pytest.raises((TypeError, ValueError, UnsupportedError), match="^logits_to_keep:"):
                attached.ask(cache, IDS[:, :6], logits_to_keep=value, **NEW)
        assert digest(cache) == before
        last = attached.ask(cache, IDS[:, :6], logits_to_keep=torch.tensor([-1]), **NEW)
        assert torch.equal(last, attached.ask(cache, IDS[:, :6], **NEW))
