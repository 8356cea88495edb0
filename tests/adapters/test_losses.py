"""Losses of an attached model: those of the plain one, or labels of padded columns refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvpolicy import CachePipeline, LocalAttention, UnsupportedError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.faults import snapshot
from tests.support.adapters.models import SIZES, prompt

PIPELINE = CachePipeline(window=5)


def batch(side):
    inputs = prompt([12, 7], side=side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs, labels


def first_of_rows(labels):
    """Without the first real label of a row padded on the left, which a padded column predicts."""
    labels = labels.clone()
    labels[1, 5] = -100
    return labels


CASES = {
    "right": lambda: (*batch("right"), {}),
    "left": lambda: (batch("left")[0], first_of_rows(batch("left")[1]), {}),
    "kept": lambda: (batch("left")[0], batch("left")[1][:, -4:], {"logits_to_keep": 4}),
    "shifted": lambda: (*batch("left"), {"shift_labels": batch("left")[1]}),
    "items": lambda: (*batch("right"), {"num_items_in_batch": torch.tensor(3)}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_loss_is_the_plain_one(llama, case):
    inputs, labels, more = CASES[case]()
    plain = llama(**inputs, labels=labels, **more).loss
    whole = {k: v for k, v in more.items() if k != "num_items_in_batch"}
    assert case != "items" or (llama(**inputs, labels=labels, **whole).loss - plain).abs() > 0.1
    with attach(llama, PIPELINE):
        assert (llama(**inputs, labels=labels, **more).loss - plain).abs() < 1e-4


@torch.no_grad()
def test_labels_of_a_next_turn(llama):
    """The mask is of all columns, or of the new ones."""
    inputs, labels = batch("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    past = llama(ids[:, :6], attention_mask=mask[:, :6]).past_key_values
    plain = llama(ids[:, 6:], attention_mask=mask, past_key_values=past, labels=labels[:, 6:]).loss
    with attach(llama, PIPELINE, **SIZES) as attached:
        for part in (mask, mask[:, 6:]):
            cache = attached.new_cache()
            llama(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
            given = {"attention_mask": part, "past_key_values": cache, "labels": labels[:, 6:]}
            assert (llama(ids[:, 6:], **given).loss - plain).abs() < 1e-4


@pytest.mark.parametrize(
    ("side", "change", "name"),
    [
        ("left", lambda labels: {"labels": labels}, "labels"),
        ("right", lambda labels: {"labels": labels.clamp(min=0)}, "labels"),
        ("right", lambda labels: {"labels": labels, "ignore_index": 3}, "labels"),
        ("right", lambda x: {"labels": x, "shift_labels": x.clamp(min=0)}, "shift_labels"),
    ],
)
@torch.no_grad()
def test_labels_of_padded_columns(llama, side, change, name):
    """A causal loss reads a label's logits from the column before it, which is padding here."""
    inputs, labels = batch(side)
    given = change(labels)
    before = snapshot(llama)
    with attach(llama, PIPELINE) as attached:
        cache = attached.new_cache()
        for call in (
            lambda: llama(**inputs, **given, past_key_values=cache),
            lambda: llama(inputs["input_ids"], inputs["attention_mask"], **given,
                          past_key_values=cache),
        ):  # fmt: skip
            with pytest.raises(UnsupportedError, match=f"^{name}: the loss would count"):
                call()
            assert cache.state is None
        llama(**inputs)
    assert snapshot(llama) == before


@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering"])
@torch.no_grad()
def test_losses_of_other_heads(llama, kind):
    """A label of its own column; a softmax over all columns."""
    torch.manual_seed(2)
    model = getattr(transformers, f"LlamaFor{kind}")(llama.config).eval()
    inputs, labels = batch("left")
    if kind == "TokenClassification":
        says, good = "labels", {**inputs, "labels": labels.clamp(max=1)}
        bad = {"labels": labels.clamp(min=0, max=1)}
    else:
        says = "end_positions"
        bad = {"start_positions": torch.tensor([6, 7]), says: torch.tensor([8, 9])}
        good = {**prompt([12, 12]), **bad}
    plain = model(**good).loss
    with attach(model, PIPELINE):
        assert (model(**good).loss - plain).abs() < 1e-4
        with pytest.raises(UnsupportedError, match=f"^{says}: the loss would count"):
            model(**inputs, **bad)


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, n):
        ids = prompt([8 + n], seed=n)["input_ids"][0]
        return {"input_ids": ids, "labels": ids}


def right(rows):
    """Collates as transformers does for causal language models."""

    def padded(name, value):
        return torch.nn.utils.rnn.pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=value
        )

    ids, labels = padded("input_ids", 0), padded("labels", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


@pytest.mark.slow
def test_a_trainer_evaluates_an_attached_model(llama, tmp_path):
    """Its prediction loop: logits of padded columns aside, the plain model's."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip

    def run():
        trainer = transformers.Trainer(llama, arguments, data_collator=right)
        loss, found = trainer.evaluate(Texts())["eval_loss"], trainer.predict(Texts())
        logits = found.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return loss, torch.as_tensor(logits), torch.as_tensor(found.label_ids)

    plain, wanted, labels = run()
    with attach(llama, PIPELINE):
        loss, found, _ = run()
        assert not llama.training
    assert loss == pytest.approx(plain, abs=1e-4)
    real = labels != -100
    assert (found - wanted)[real].abs().max() < 1e-3
    with attach(llama, CachePipeline(admission=LocalAttention(window=2))):
        assert run()[0] != pytest.approx(plain, abs=1e-3)
