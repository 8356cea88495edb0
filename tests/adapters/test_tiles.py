"""Selections that act while prefilling, on models: parts of prompts, and what is refused."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import (
    CachePipeline,
    FlexPrefill,
    PerPhase,
    Quest,
    SelectAll,
    UnsupportedError,
    VerticalSlash,
    XAttention,
    per_layer,
)
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.continuations import continued
from tests.support.adapters.faults import digest
from tests.support.adapters.models import SIZES, Striped, error, prompt

TILE = 8
GREEDY = {
    "max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip
CHOOSES = XAttention(threshold=0.4, stride=2, tile=TILE)
SELECTIONS = {
    "xattention": CHOOSES,
    "with quest": PerPhase(prefill=CHOOSES, decode=Quest(budget=9)),
    "layers": per_layer(CHOOSES, {0: SelectAll()}),
}
WHOLE = {
    "FlexPrefill": FlexPrefill(gamma=0.4, tau=0.3, min_budget=4, tile=4),
    "VerticalSlash": PerPhase(
        prefill=VerticalSlash(vertical=3, slash=1, queries=3, first=1, nearest=1, tile=4),
        decode=Quest(budget=9),
    ),
}


def pipeline(selection):
    return CachePipeline(admission=Striped(), selection=selection, window=5)


@pytest.mark.parametrize("name", SELECTIONS)
def test_parts_end_between_tiles(llama, name):
    """As in one call: contexts, further turns and prompts of generate in chunks of any size."""
    context, turn = prompt([60, 60 - TILE]), prompt([37, 37], seed=3)
    with attach(llama, pipeline(SELECTIONS[name]), **SIZES) as attached:
        found = []
        for size in (None, 3, 11, 24):
            cache = attached.read(**context, chunk_size=size)
            report = cache.report()
            for layer, part in enumerate(report.prompt_read):
                assert part is None if name == "layers" and layer == 0 else part < 0.95
            cache = attached.read(turn["input_ids"], cache=cache, chunk_size=size)
            tokens = torch.tensor([[7], [9]])
            found.append((llama(tokens, past_key_values=cache).logits, report.prompt_read))
        whole = attached.read(**context)
        whole = attached.read(turn["input_ids"], cache=whole)
        for logits, read in found[1:]:
            torch.testing.assert_close(logits, found[0][0], atol=1e-4, rtol=0)
            assert read == found[0][1]
        one, other = (
            llama.generate(**context, **GREEDY, **x) for x in ({}, {"prefill_chunk_size": 11})
        )
        assert error(one, other) < 1e-4 and torch.equal(one.sequences, other.sequences)


def test_a_batch_gives_what_each_gets_alone(llama):
    context = prompt([60, 41])
    with attach(llama, pipeline(CHOOSES), **SIZES):
        both = llama.generate(**context, **GREEDY)
        for row, n in enumerate((60, 41)):
            alone = llama.generate(context["input_ids"][row : row + 1, 60 - n :], **GREEDY)
            got = torch.stack([x[row] for x in both.logits])
            torch.testing.assert_close(got, torch.cat(alone.logits), atol=1e-4, rtol=0)


def test_rows_whose_tiles_no_cut_suits_are_refused(llama):
    context = prompt([60, 57])
    with attach(llama, pipeline(CHOOSES), **SIZES) as attached:
        with pytest.raises(
            UnsupportedError, match=r"chunk_size: XAttention decides for 8 positions"
        ):
            attached.read(**context, chunk_size=20)
        attached.read(**prompt([60, 57], side="right"), chunk_size=20)
        with pytest.raises(UnsupportedError, match="prefill_chunk_size: XAttention .* padding"):
            llama.generate(**context, prefill_chunk_size=16, max_new_tokens=2)
        cache = attached.read(prompt([60])["input_ids"])
        before = digest(cache)
        with pytest.raises(
            UnsupportedError, match="prefill_chunk_size: XAttention .* attached.read"
        ):
            llama.generate(
                prompt([90])["input_ids"], past_key_values=cache, prefill_chunk_size=16,
                max_new_tokens=2,
            )  # fmt: skip
        assert digest(cache) == before


@pytest.mark.parametrize("name", WHOLE)
def test_whole_prompts_come_in_one_call(llama, name):
    context = prompt([60, 41])
    ids = context["input_ids"][:1]
    with attach(llama, pipeline(WHOLE[name]), **SIZES) as attached:
        attached.forwards.warned = True
        refused = {
            "chunk_size": lambda: attached.read(ids, chunk_size=30),
            "prefill_chunk_size": lambda: llama.generate(ids, prefill_chunk_size=30),
            "loglikelihood": lambda: attached.loglikelihood(ids, ids[:, :3]),
            "packed texts": lambda: llama(
                ids, position_ids=torch.cat([torch.arange(30)] * 2)[None], use_cache=False
            ),
        }
        refused["loglikelihood "] = lambda: continued(attached, [((3, 4, 5), (6,))])
        for what, call in refused.items():
            with pytest.raises(UnsupportedError, match=f"{what.strip()}: {name} decides"):
                call()
        cache = attached.read(**context)
        assert max(x for x in cache.report().prompt_read) < 0.95
        before = digest(cache)
        more = f"past_key_values, which holds 60 columns: {name} decides"
        with pytest.raises(UnsupportedError, match=more):
            attached.read(context["input_ids"], cache=cache)
        with pytest.raises(UnsupportedError, match=more):
            attached.ask(cache, context["input_ids"][:, :4], question="prompt", max_new_tokens=2)
        with pytest.raises(UnsupportedError, match=more):
            ids = torch.cat([context["input_ids"], context["input_ids"][:, :5]], 1)
            mask = torch.cat([context["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
            llama.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
        assert digest(cache) == before
        answer = attached.ask(cache, context["input_ids"][:, :4], max_new_tokens=3)
        assert answer.shape == (2, 7)
        out = llama.generate(**context, **GREEDY)
        assert attached.last_report().policies["selection"]
        assert out.sequences.shape == (2, 65)
