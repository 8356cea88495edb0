"""What documents may come as, and random ungating."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from kvpolicy.adapters.hf.training import attach_for_training
from kvpolicy.training import TrainingMix, WriteGates, documents, train_write_gate
from kvpolicy.training.objective import choose_kernel, kept_fraction, ungate
from kvpolicy.training.student import gated_forward
from tests.support.training.small import TEXT, make_mix, make_model, make_tokenizer


def test_documents_are_strings_ids_or_rows():
    tokenizer = make_tokenizer()
    rows = [TEXT, [5] * 300, {"text": TEXT[:500], "id": 3}, "short"]
    found = documents(rows, tokenizer, length=192)
    assert [len(ids) for ids in found] == [3000, 300, 500]
    named = documents([{"body": TEXT}], tokenizer, length=192, column="body")
    assert named == [[ord(c) for c in TEXT]]
    with pytest.raises(
        ValueError, match="texts: wanted rows with a column 'text', got \\['body'\\]"
    ):
        documents([{"body": TEXT}], tokenizer, length=192)
    with pytest.raises(TypeError, match="got int"):
        documents([7], tokenizer, length=192)  # type: ignore[list-item]


def test_an_endless_stream_is_read_as_far_as_needed():
    read = []

    def stream():
        for number in itertools.count():
            read.append(number)
            yield {"text": TEXT[:400] if number % 2 else "short"}

    found = documents(stream(), make_tokenizer(), length=192, sequences=6)
    assert len(found) == 3 and read == [0, 1, 2, 3, 4, 5]
    read.clear()
    options = {"steps": 2, "window": 8, "lam": 0.1, "length": 192, "batch_size": 1}
    train_write_gate(make_model(), stream(), tokenizer=make_tokenizer(), **options)
    assert read == [0, 1]


def test_passages_that_are_asked_for_are_in_the_text():
    letters = "".join(random.Random(5).choices("abcdefghijklmnopqrstuvwxyz", k=9000))
    mix = TrainingMix(texts=[letters], tokenizer=make_tokenizer(), length=4096)
    rng, asked = random.Random(0), 0
    for _ in range(60):
        ids, mask = mix.sequence("copy", rng)
        assert len(ids) == len(mask) == 4096
        text = "".join(map(chr, ids[: mask.index(True)])) if any(mask) else ""
        for answer, run in itertools.groupby(zip(mask, ids, strict=True), key=lambda x: x[0]):
            # The tokenizer puts spaces between characters, so that questions are long.
            passage = "".join(chr(token) for _, token in run).replace(" ", "")
            asked += answer
            assert not answer or passage in text
    assert asked > 60


def test_ungating_opens_as_many_positions_of_every_head():
    gate = torch.rand(2, 3, 50) / 2
    opened = ungate(gate, 7, seed=1)
    assert ((opened == 1).sum(-1) == 7).all()
    assert torch.equal(opened[opened < 1], gate[opened < 1])
    assert torch.equal(opened, ungate(gate, 7, seed=1))
    assert not torch.equal(opened, ungate(gate, 7, seed=2))
    assert (opened == 1)[0].float().std(0).max() > 0  # heads differ
    assert ungate(gate, 0, seed=1) is gate
    with pytest.raises(ValueError, match="0 to 50"):
        ungate(gate, 51, seed=1)


def test_ungated_positions_act_in_training_and_are_not_counted_as_kept():
    model, ids = make_model(), make_mix().batch(0, 1).input_ids
    gates = WriteGates.for_model(model)
    with torch.no_grad():
        for layer in gates.layers:
            layer.conv2.bias.fill_(-50)
        with attach_for_training(model) as attached:
            plain = gated_forward(attached, gates, ids, window=8)
            some = gated_forward(attached, gates, ids, window=8, ungated=20, seed=3)
            hard = gated_forward(attached, gates, ids, window=8, threshold=0.1, ungated=20)
            shut = gated_forward(attached, gates, ids, window=8, threshold=0.1)
    assert not torch.allclose(plain.hidden, some.hidden, atol=1e-3)
    assert ((some.gate == 1).sum(-1) == 20).all()
    assert kept_fraction(some.free, window=8, threshold=0.1).max() == 8 / 192
    assert torch.equal(hard.hidden, shut.hidden)


@pytest.mark.parametrize("count", [0, 30])
def test_gradients_do_not_depend_on_checkpointing(count):
    model, ids = make_model(), make_mix().batch(0, 1).input_ids
    found = []
    for checkpointing in (True, False):
        torch.manual_seed(1)
        gates = WriteGates.for_model(model)
        with attach_for_training(model, checkpointing=checkpointing) as attached:
            student = gated_forward(attached, gates, ids, window=8, ungated=count, seed=5)
            (student.hidden.square().mean() + student.gate.mean()).backward()
        found.append([p.grad for p in gates.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_kernel_follows_the_device():
    assert choose_kernel(torch.device("cpu"), 64) == "dense"
    assert choose_kernel(torch.device("cuda"), 128) == "flash"
    assert choose_kernel(torch.device("cuda"), 100) == "flex"
    assert choose_kernel(torch.device("cuda"), 128, 50.0) == "flex"
