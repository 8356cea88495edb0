"""What is recorded of columns, against each sequence's columns as a plain list."""

from __future__ import annotations

import random

import pytest
import torch

from kvpolicy import UnsupportedError
from kvpolicy.adapters.hf.columns import (
    append,
    check_stored,
    from_tensors,
    gaps,
    new_columns,
    pick,
    real,
    take_back,
    to_tensors,
)

BATCH = 3


def history(seed):
    """Chunks of a random history, and whether each column was real `[row][column]`."""
    draw = random.Random(seed)
    chunks, rows = [], [[] for _ in range(BATCH)]
    for _ in range(draw.randrange(5)):
        columns = draw.randrange(1, 5)
        share = draw.choice([0.3, 0.8, 1.0])
        valid = [[draw.random() < share for _ in range(columns)] for _ in range(BATCH)]
        chunks = append(chunks, columns, None if share == 1 else torch.tensor(valid))
        for row, more in zip(rows, valid, strict=True):
            row += more
    return chunks, rows


@pytest.fixture(params=range(10))
def seen(request):
    return history(request.param)


def listed(chunks, batch=BATCH):
    return real(chunks, batch).tolist()


def test_real_columns_and_their_files(seen):
    chunks, rows = seen
    assert listed(chunks) == rows
    assert listed(from_tensors(to_tensors(chunks, BATCH))) == rows
    whole = [valid is None for _, valid in chunks]
    assert (True, True) not in zip(whole, whole[1:], strict=False)  # those are one chunk


def test_a_gap_is_a_hidden_column_after_a_real_one(seen):
    chunks, rows = seen
    assert gaps(chunks, BATCH) == [any(row) and False in row[row.index(True) :] for row in rows]


def test_a_gap_between_calls():
    began = append([], 1, torch.tensor([[True], [False]]))
    later = torch.tensor([[False, True], [False, True]])
    assert gaps(append(began, 2, later), 2) == [True, False]


def test_sequences_are_picked(seen):
    chunks, rows = seen
    for order in ([2, 0], [1, 1, 1, 0], [0, -1, 2], [-1]):
        wanted = [rows[n] if n >= 0 else [False] * len(rows[0]) for n in order]
        assert listed(pick(chunks, order), len(order)) == wanted


def test_columns_are_taken_back(seen):
    chunks, rows = seen
    for left in range(len(rows[0]) + 1):
        kept, counts = take_back(chunks, len(rows[0]) - left, BATCH)
        assert listed(kept) == [row[:left] for row in rows]
        assert counts == [sum(row[left:]) for row in rows]
    assert listed(chunks) == rows


def test_a_mask_is_of_the_next_columns_or_of_all(seen):
    chunks, rows = seen
    before = torch.tensor(rows).view(BATCH, -1).long()
    new = torch.tensor([[1, 1], [0, 1], [1, 1]])
    assert new_columns(None, chunks, BATCH, 2) is None
    assert torch.equal(new_columns(new, chunks, BATCH, 2), new)
    whole = torch.cat([before, new, torch.ones(BATCH, 3).long()], 1)
    assert torch.equal(new_columns(whole, chunks, BATCH, 2), new)
    if before.shape[1] > 1:
        with pytest.raises(ValueError, match=r"attention_mask: wanted \[3, 1\], or at least"):
            new_columns(whole[:, : before.shape[1]], chunks, BATCH, 1)


def test_a_mask_that_differs_from_what_is_stored():
    chunks = append(append([], 2, None), 2, torch.tensor([[True, True], [False, True]]))
    stored = real(chunks, 2)
    check_stored(torch.cat([stored, torch.ones(2, 1).bool()], 1), chunks, 2)
    for at, says in (((1, 2), "shows columns"), ((0, 3), "hides columns")):
        other = stored.clone()
        other[at] = ~other[at]
        with pytest.raises(UnsupportedError, match=f"^attention_mask: it {says} that the cache"):
            check_stored(other, chunks, 2)


def test_a_mask_of_prompts_whose_sequences_were_repeated():
    """As beams are: the mask has a row for each group of sequences that are alike."""
    chunks = append([], 2, torch.tensor([[False, True], [False, True], [True, True], [True, True]]))
    check_stored(torch.tensor([[0, 1], [1, 1]]), chunks, 4)
    with pytest.raises(UnsupportedError, match="shows columns that the cache does not hold"):
        check_stored(torch.tensor([[1, 1], [1, 1]]), chunks, 4)
