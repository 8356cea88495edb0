"""Ablations on a tiny model: one thing differs, and what is finished is not made again."""

from __future__ import annotations

import json

import attrs
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner  # noqa: E402

from kvpolicy import CachePipeline, WriteGate, attach  # noqa: E402
from kvpolicy.cli import app  # noqa: E402
from kvpolicy.evaluation.ablations import kinds, shift, tiny  # noqa: E402
from kvpolicy.evaluation.ablations.baselines import AtPositions, _frequency  # noqa: E402
from kvpolicy.evaluation.ablations.lab import Lab  # noqa: E402
from kvpolicy.evaluation.ablations.tiny import TINY, tiny_prose  # noqa: E402
from kvpolicy.evaluation.models import tiny_llama, tiny_tokenizer  # noqa: E402
from kvpolicy.testing import check_admission  # noqa: E402
from kvpolicy.training import train_write_gate  # noqa: E402


def call(what, out, code=0, *more):
    told = ["ablate", what, "--quick", "--out", str(out), *more]
    done = CliRunner().invoke(app, told, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def points(path):
    return json.loads(path.read_text())["points"]


@pytest.mark.parametrize("inputs", ["pre", "post"])
def test_a_gate_of_one_key_reads_no_other(inputs):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    told = {"steps": 3, "lam": 0.16, "window": 8, "length": 64, "batch_size": 1, "lr": 0.1}
    trained = train_write_gate(model, [tiny_prose()], tokenizer=tokenizer, inputs=inputs, **told)
    fields, dim = trained.gates.fields(), 32
    pre, post = fields["w1"][..., :dim], fields["w1"][..., dim:]
    read, other = (pre, post) if inputs == "pre" else (post, pre)
    assert (other == 0).all() and (read != 0).all()
    keys = torch.randn(3, 1, 2, 5, dim)
    layer = trained.gates.layers[0]
    one = layer(keys[0], keys[1])
    same, moved = (keys[0], keys[2]), (keys[2], keys[1])
    same, moved = (same, moved) if inputs == "pre" else (moved, same)
    assert torch.equal(one, layer(*same)) and not torch.equal(one, layer(*moved))


def test_what_is_finished_is_not_made_again(tmp_path, monkeypatch):
    small = attrs.evolve(TINY, length=400, contexts=1, asks=False)
    monkeypatch.setattr(tiny, "TINY", small)
    first = call("inputs", tmp_path)
    assert first.output.count("trained 2 steps") == 3
    found = points(tmp_path / "inputs.json")
    assert {x["curve"] for x in found} == {"full", "both keys", "key before RoPE", "key after RoPE"}
    full = next(x for x in found if x["curve"] == "full")
    assert full["x"] == 1
    for curve in {x["curve"] for x in found} - {"full"}:
        low, high = (x["x"] for x in found if x["curve"] == curve)
        assert high < low < 1  # a higher threshold holds less
    table = (tmp_path / "inputs.md").read_text()
    again = call("inputs", tmp_path)
    assert "trained" not in again.output
    assert (tmp_path / "inputs.md").read_text() == table
    over = call("width", tmp_path, 1, "--minutes", "0")
    assert "the time is over" in over.output


@pytest.mark.slow
@pytest.mark.parametrize("what", ["window", "baselines", "shift", "pareto"])
def test_every_ablation_writes_points(tmp_path, what):
    call(what, tmp_path)
    name = what if what == "pareto" else f"{what}-1"
    found = points(tmp_path / f"{name}.json")
    assert all(0 < x["x"] <= 1.2 for x in found)
    curves = {x["curve"] for x in found}
    wanted = {
        "window": {"full", "window 1", "window 16"},
        "baselines": {"full", "write gate", "random", "rare tokens", "frequent tokens"},
        "shift": {"prose", "chat"},
        "pareto": {"no cap", "cap 0.5"},
    }
    assert curves == wanted[what]
    if what == "pareto":
        assert any(x["more"]["on the front"] for x in found)


def test_rare_and_frequent_tokens_share_a_document():
    counts = {1: 10, 2: 3, 3: 1}
    ids = torch.tensor([1, 1, 2, 3, 1, 2, 1, 3])
    rare, frequent = (
        _frequency(counts, 0.5, 2, often, ids).admission.admitted for often in (False, True)
    )
    assert torch.equal(rare, ids != 1) and torch.equal(frequent, ids == 1)


def test_admission_at_positions_keeps_its_contract():
    admitted = torch.arange(64) % 3 == 0
    check_admission(AtPositions(admitted=admitted))


def test_a_threshold_is_adapted_to_a_request(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    lab = Lab(
        model=model, tokenizer=tokenizer, texts=[tiny_prose()], asked={"": tiny_prose()},
        out=tmp_path, recipe=TINY, settings={}, deadline=1e12, say=lambda said: None,
    )  # fmt: skip
    gate, ids = lab.gate(), lab.documents()[1][:600]
    for part in (0.3, 0.7):
        tau = shift._threshold(lab, gate, ids, part)
        assert isinstance(gate, WriteGate)
        with attach(model, CachePipeline(admission=attrs.evolve(gate, threshold=tau))) as here:
            report = here.read(ids[None]).report()
        held = [x for layer in report.stored for x in layer]
        assert sum(held) / len(held) / len(ids) == pytest.approx(part, rel=0.06)


def test_kinds_of_text_are_of_their_kind():
    prose = " ".join(f"A {w} of some words went home and came back again." for w in "abcde" * 4)
    table = kinds.tables(prose)
    assert table.startswith("Table 1.") and "\n\nTable 2." in table
    assert {"User", "Assistant"} == {x.split(":")[0] for x in kinds.chats(prose).split("\n\n")}
    found = kinds.kinds_of_text(prose, languages=("xx",))
    assert "def " in found["code"] and "xx" not in found
