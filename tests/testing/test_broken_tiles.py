"""The conformance kit rejects broken selections of prompts by the name of what they break."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import (
    FlexPrefill,
    PerPhase,
    PromptSelection,
    Quest,
    Reads,
    SelectAll,
    VerticalSlash,
    XAttention,
    per_layer,
)
from kvpolicy.testing import ConformanceError, check_selection

XATTENTION = XAttention(threshold=0.6, stride=2, tile=8)


def best_block(view, tile, query):
    """The block before each tile of the largest mean q.k, for `query` `[Hq, N, D]`."""
    tiles, group = view.tiles(tile), view.query.shape[0] // view.keys.shape[0]
    pad = torch.nn.functional.pad(view.keys, (0, 0, 0, tiles.stop * tile - view.keys.shape[1]))
    keys = pad.view(view.keys.shape[0], tiles.stop, tile, -1).mean(2).repeat_interleave(group, 0)
    block = torch.arange(tiles.stop)
    logits = query @ keys.mT
    logits = logits.masked_fill(block >= block[tiles.start :, None], float("-inf"))
    return block == logits.argmax(-1)[..., None]


def own_queries(view, tile):
    """Mean queries of tiles."""
    tiles = view.tiles(tile)
    before = view.start - tiles.start * tile
    after = tiles.stop * tile - view.keys.shape[1]
    query = torch.nn.functional.pad(view.query, (0, 0, before, after))
    return query.view(query.shape[0], len(tiles), tile, -1).sum(2)


def honest(self, view):
    return Reads(best_block(view, self.tile, own_queries(view, self.tile)))


def looks_ahead(self, view):
    """By the last query of all, as FlexPrefill does without saying so."""
    last = view.query[:, -1:].expand(-1, len(view.tiles(self.tile)), -1)
    return Reads(best_block(view, self.tile, last))


def looks_ahead_at_columns(self, view):
    """The heaviest token of the whole prompt, for every tile."""
    logits = (
        view.query[:, -1].view(view.keys.shape[0], -1, 1, view.keys.shape[2]) * view.keys[:, None]
    ).sum(-1)
    columns = logits.flatten(0, 1).argmax(-1)[:, None, None]
    return Reads(honest(self, view).blocks, columns)


def counts_from_the_call(self, view):
    """By the place in the call."""
    blocks = honest(self, view).blocks
    blocks[:, 1::2] = False
    return Reads(blocks)


def of_other_heads(self, view):
    blocks = honest(self, view).blocks
    return Reads(blocks.any(0, keepdim=True).expand_as(blocks))


def of_the_wrong_shape(self, view):
    return Reads(honest(self, view).blocks[:, :-1])


def of_numbers(self, view):
    return Reads(honest(self, view).blocks.int())


def random(self, view):
    return Reads(torch.rand(view.query.shape[0], len(view.tiles(8)), view.tiles(8).stop) < 0.5)


def everything(self, view):
    return Reads(torch.ones_like(honest(self, view).blocks))


def made(prompt, **options):
    members = {"tile": 8, "prompt": prompt, **options}
    return attrs.frozen(type("Mine", (PromptSelection,), members))()


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        (looks_ahead, "look-ahead"),
        (looks_ahead_at_columns, "look-ahead"),
        (counts_from_the_call, "cut"),
        (of_other_heads, "heads"),
        (of_the_wrong_shape, "shape"),
        (of_numbers, "shape"),
        (random, "stateless"),
        (everything, "takes effect"),
        (lambda self, view: None, "shape"),
        (lambda self, view: view.missing, "runs"),
    ],
)
def test_broken_selections_are_rejected(prompt, rule):
    with pytest.raises(ConformanceError, match=f"Mine breaks '{rule}'") as error:
        check_selection(made(prompt))
    assert error.value.rule == rule


def test_a_broken_layer_is_found():
    with pytest.raises(ConformanceError, match="Mine breaks 'look-ahead'"):
        check_selection(per_layer(made(honest), {1: made(looks_ahead)}))
    with pytest.raises(ConformanceError, match="PerPhase breaks 'look-ahead'"):
        check_selection(PerPhase(prefill=made(looks_ahead), decode=Quest(budget=24)))


@pytest.mark.parametrize(
    "policy",
    [
        made(honest),
        made(looks_ahead, whole_prompt=True),
        XATTENTION,
        PerPhase(prefill=XATTENTION, decode=Quest(budget=24)),
        per_layer(PerPhase(prefill=XATTENTION, decode=Quest(budget=24)), {0: Quest(budget=40)}),
        per_layer(XATTENTION, {1: SelectAll()}),
        FlexPrefill(gamma=0.5, tau=0.3, min_budget=8, tile=8),
        VerticalSlash(vertical=4, slash=2, queries=5, first=1, nearest=1, tile=8),
        PerPhase(decode=Quest(budget=24)),
    ],
    ids=str,
)
def test_sound_ones_pass(policy):
    check_selection(policy)


def test_everything_may_be_read():
    check_selection(XAttention(threshold=1, tile=8), takes_effect=False)
    with pytest.raises(ConformanceError, match="takes effect"):
        check_selection(XAttention(threshold=1, tile=8))
