"""Continuous batching: sequences leave and join a running batch through the adapter's cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvpolicy import CachePipeline
from kvpolicy.adapters.hf import attach
from tests.support.adapters.faults import digest
from tests.support.adapters.models import SIZES, pipelines, prompt, tiny

NAMES = [name for name in pipelines() if name != "striped"]


class Batch:
    """A loop that serves requests: each is a prompt and a number of tokens to add."""

    def __init__(self, model, attached):
        self.model, self.cache = model, attached.new_cache()
        self.said, self.logits = [], []  # of the sequences in the batch

    def _forward(self, ids, mask=None):
        logits = self.model(input_ids=ids, attention_mask=mask, past_key_values=self.cache).logits
        return logits[:, -1]

    def start(self, prompts):
        """The first prompts, padded at the left."""
        width = max(map(len, prompts))
        ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
        for row, tokens in enumerate(prompts):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        logits = self._forward(ids, mask)
        self.cache.end_prompt()
        for row in logits:
            self.said.append([int(row.argmax())])
            self.logits.append([row])

    def join(self, tokens, chunk):
        """A new sequence at the end of the batch; the others wait while its prompt is read."""
        batch = len(self.said)
        self.cache.batch_select_indices(torch.tensor([*range(batch), -1]))
        self.cache.begin_prompt()
        for at in range(0, len(tokens), chunk):
            new = torch.tensor(tokens[at : at + chunk])
            ids, mask = (torch.zeros(batch + 1, len(new), dtype=torch.long) for _ in range(2))
            ids[-1], mask[-1] = new, 1
            logits = self._forward(ids, mask)
        self.cache.end_prompt()
        self.said.append([int(logits[-1].argmax())])
        self.logits.append([logits[-1]])

    def leave(self, row):
        """Takes a sequence out; returns what it said, with logits, and what its heads hold."""
        kept = [self.cache.state.kept(x, row, h).tolist() for x in (0, 1) for h in (0, 1)]
        found = self.said.pop(row), torch.stack(self.logits.pop(row)), kept
        rest = [r for r in range(len(self.said) + 1) if r != row]
        self.cache.batch_select_indices(torch.tensor(rest))
        return found

    def step(self, count=1):
        for _ in range(count):
            logits = self._forward(torch.tensor([said[-1:] for said in self.said]))
            for said, logs, row in zip(self.said, self.logits, logits, strict=True):
                said.append(int(row.argmax()))
                logs.append(row)


def requests():
    rng = torch.Generator().manual_seed(7)
    draw = lambda n: torch.randint(3, 200, (n,), generator=rng).tolist()  # noqa: E731
    return [draw(n) for n in (33, 21, 28, 40)]


def alone(model, attached, tokens, steps):
    batch = Batch(model, attached)
    batch.start([tokens])
    batch.step(steps)
    kept = [batch.cache.state.kept(x, 0, h).tolist() for x in (0, 1) for h in (0, 1)]
    return batch.said[0], torch.stack(batch.logits[0]), kept


def assert_same(found, wanted):
    assert found[0] == wanted[0]
    assert (found[1] - wanted[1]).abs().max() < 1e-3
    assert found[2] == wanted[2]


@pytest.mark.parametrize("chunk", [64, 9])
@pytest.mark.parametrize("name", NAMES)
def test_each_sequence_gets_what_it_gets_alone(llama, name, chunk):
    first, second, third, fourth = requests()
    with attach(llama, pipelines()[name], **SIZES) as attached:
        batch = Batch(llama, attached)
        batch.start([first, second])
        batch.step(5)
        batch.join(third, chunk)
        batch.step(4)
        found = {1: batch.leave(1)}  # decoded 9 tokens
        batch.step(3)
        found[0] = batch.leave(0)  # 12
        batch.join(fourth, chunk)
        batch.step(10)
        found[3] = batch.leave(1)  # 10
        assert batch.cache.state.batch == 1
        found[2] = batch.said[0], torch.stack(batch.logits[0]), None
        for row, (tokens, steps) in enumerate(
            [(first, 12), (second, 9), (third, 17), (fourth, 10)]
        ):
            wanted = alone(llama, attached, tokens, steps)
            assert_same(found[row], wanted if row != 2 else (*wanted[:2], None))
        assert all(len(heads) < 33 + 13 for heads in found[0][2]) or name == "quest"


def test_sequences_that_left_cost_nothing(llama):
    """Pages of those that leave come back, and the last one holds what a batch of one would."""
    first, second, third, _ = requests()
    with attach(llama, pipelines()["gate"], **SIZES) as attached:
        batch = Batch(llama, attached)
        batch.start([first, second])
        batch.join(third, 64)
        batch.leave(0)
        batch.leave(0)
        single = Batch(llama, attached)
        single.start([third])
        mine, theirs = batch.cache.report(), single.cache.report()
        for part in ("pages", "positions", "ring", "tokens"):
            assert getattr(mine, part) == getattr(theirs, part) > 0


def test_rows_that_do_not_exist(llama):
    with attach(llama, pipelines()["all"], **SIZES) as attached:
        batch = Batch(llama, attached)
        batch.start(requests()[:2])
        before = digest(batch.cache)
        for rows in ([0, 2], [-2], [0.0, 1.0], [[0, 1]], [True], []):
            with pytest.raises(ValueError, match="(indices|rows): wanted "):
                batch.cache.batch_select_indices(torch.tensor(rows))
        with pytest.raises(ValueError, match="indices: wanted numbers of the 2 sequences"):
            batch.cache.batch_select_indices("01")
        for rows in ([-1, 0], [2, 0], [0.0, 1.0], [True, True], [[0, 1]]):
            with pytest.raises((TypeError, ValueError), match="beam_idx: wanted "):
                batch.cache.reorder_cache(torch.tensor(rows))
        assert digest(batch.cache) == before


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([True, False, True]), torch.tensor([1, 0, 1], dtype=torch.uint8),
        torch.tensor([2, 0], dtype=torch.int32), [2, 0], [True, False, True], slice(0, 2),
        slice(None, None, 2), torch.tensor([1, 1]), np.array([2, 0]), range(0, 3, 2),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
def test_rows_are_picked_as_from_a_tensor(llama, indices):
    ids = prompt([9, 9, 9])["input_ids"]
    plain = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids, past_key_values=plain)
        plain.batch_select_indices(indices)
        wanted = llama(ids[:2, :3], past_key_values=plain).logits
        with attach(llama, CachePipeline(window=5), **SIZES) as attached:
            cache = attached.new_cache()
            cache.batch_select_indices(indices)  # as transformers', of which nothing is picked yet
            llama(ids, past_key_values=cache)
            cache.batch_select_indices(indices)
            found = llama(ids[:2, :3], past_key_values=cache).logits
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_crop_back_to_before_a_sequence_joined(llama):
    with attach(llama, CachePipeline(window=5), **SIZES) as attached:
        batch = Batch(llama, attached)
        batch.start([[5, 6, 7, 8, 9], [4, 5, 6]])
        batch.join([7, 8], chunk=2)
        cache = batch.cache
        cache.crop(-3)  # two columns of the new sequence, one of those that were there
        assert cache.state.lengths == [4, 2, 0]
        fork = cache.fork([2, 0])
        assert fork.state.lengths == [0, 4]
        fork.crop(-1)
        assert fork.state.lengths == [0, 3]


def test_a_cache_of_another_model_of_the_same_shape_is_refused(llama):
    other = tiny(seed=3)
    pipeline = CachePipeline(window=5)
    with attach(other, pipeline, **SIZES) as elsewhere:
        cache = elsewhere.new_cache()
        ids = torch.tensor([[5, 6, 7]])
        other(input_ids=ids, past_key_values=cache)
    with attach(llama, pipeline, **SIZES), pytest.raises(ValueError, match="another model"):
        llama(input_ids=ids, past_key_values=cache)
