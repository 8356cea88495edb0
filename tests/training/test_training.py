from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvpolicy.adapters.hf.training import AttachedModel, attach_for_training
from kvpolicy.training import (
    TrainingMix,
    WriteGates,
    keys_fingerprint,
    train_duo_attention,
    train_write_gate,
)
from kvpolicy.training.objective import distillation_loss, memory_cost
from kvpolicy.training.student import evaluate_gates, gated_forward
from tests.support.training.small import SIZES, TEXT, make_mix, make_tokenizer

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=None, **SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


def make_model(name: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.fixture(scope="module")
def mix() -> TrainingMix:
    return make_mix()


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_gate(name: str, checkpointing: bool, mix: TrainingMix) -> None:
    model, ids = make_model(name), mix.batch(0, 1).input_ids
    gates = WriteGates.for_model(model)
    with attach_for_training(model, checkpointing=checkpointing) as attached:
        with torch.no_grad():
            teacher = attached.hidden(ids)
        student = gated_forward(attached, gates, ids, window=8)
        distillation_loss(student.hidden, teacher).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_open_gates_give_the_model_itself(name: str, mix: TrainingMix) -> None:
    model, ids = make_model(name), mix.batch(0, 2).input_ids
    gates = WriteGates.for_model(model)
    with torch.no_grad():
        for layer in gates.layers:
            layer.conv2.bias.fill_(50)
        want = model.base_model(ids).last_hidden_state
        with attach_for_training(model) as attached:
            torch.testing.assert_close(attached.hidden(ids), want, atol=1e-4, rtol=1e-4)
            got = gated_forward(attached, gates, ids, window=8)
            hard = gated_forward(attached, gates, ids, window=8, threshold=0.1)
    assert (got.gate == 1).all() and got.gate.shape == (2, 2, 2, 192)
    torch.testing.assert_close(got.hidden, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hard.hidden, want, atol=1e-4, rtol=1e-4)


def test_closed_gates_are_a_sliding_window(mix: TrainingMix) -> None:
    model, ids = make_model(), mix.batch(0, 1).input_ids
    sliding = MistralForCausalLM(MistralConfig(sliding_window=8, **SIZES)).eval()
    sliding.load_state_dict(model.state_dict())
    gates = WriteGates.for_model(model)
    with torch.no_grad():
        for layer in gates.layers:
            layer.conv2.bias.fill_(-50)
        want = sliding.base_model(ids).last_hidden_state
        with attach_for_training(model) as attached:
            got = gated_forward(attached, gates, ids, window=8, threshold=0.1).hidden
            dense = attached.hidden(ids)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (dense - want).abs().max() > 0.1


def test_attach_restores_the_model() -> None:
    model = make_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    implementation = model.config._attn_implementation
    with pytest.raises(KeyError), attach_for_training(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert {n: len(m._forward_hooks) for n, m in model.named_modules()} == hooks
    assert model.config._attn_implementation == implementation
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_that_slides_everywhere_is_refused(mix: TrainingMix) -> None:
    model = MistralForCausalLM(MistralConfig(sliding_window=8, **SIZES)).eval()
    with pytest.raises(ValueError, match="model: every layer uses a sliding window"):
        train_write_gate(model, mix, steps=1, window=4, lam=0.1)


def _losses(model, gates: WriteGates, mix: TrainingMix) -> float:
    ids = mix.batch(0, 4).input_ids
    with torch.no_grad(), attach_for_training(model) as attached:
        student = gated_forward(attached, gates, ids, window=8)
        loss = distillation_loss(student.hidden, attached.hidden(ids))
    return float(loss + 0.16 * memory_cost(student.gate, 8))


def test_training_lowers_the_loss_and_leaves_the_model(mix: TrainingMix) -> None:
    model = make_model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"window": 8, "batch_size": 2, "lam": 0.16, "lr": 1e-2}
    start = train_write_gate(model, mix, steps=1, **options)  # the first update has rate 0
    trained = train_write_gate(model, mix, steps=15, **options)
    assert trained.lam == 0.16 and trained.fingerprint == keys_fingerprint(model)
    assert _losses(model, trained.gates, mix) < 0.9 * _losses(model, start.gates, mix)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_resumed_training_equals_uninterrupted(mix: TrainingMix, tmp_path: Path) -> None:
    options = {"steps": 6, "window": 8, "batch_size": 1, "target_keep": 0.3}
    whole = train_write_gate(make_model(), mix, **options, out_dir=tmp_path / "a", eval_every=3)
    train_write_gate(make_model(), mix, **options, out_dir=tmp_path / "b", stop_after=2)
    again = train_write_gate(make_model(), mix, **options, out_dir=tmp_path / "b")
    for left, right in zip(whole.gates.parameters(), again.gates.parameters(), strict=True):
        assert torch.equal(left, right)
    assert (whole.keep, whole.lam) == (again.keep, again.lam)
    logs = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in "ab"
    ]
    assert [m["loss"] for m in logs[0]] == [m["loss"] for m in logs[1]]
    assert [m["step"] for m in logs[1]] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "keep", "accuracy", "accuracy_full"} == set(logs[0][2]["hard"])


def test_continued_gates_are_not_changed(mix: TrainingMix) -> None:
    model = make_model()
    first = train_write_gate(model, mix, steps=1, window=8, lam=0.1)
    before = [p.clone() for p in first.gates.parameters()]
    train_write_gate(model, mix, steps=3, window=8, lam=0.1, start=first.gates)
    assert all(torch.equal(a, b) for a, b in zip(before, first.gates.parameters(), strict=True))


def test_training_moves_the_cache_to_the_target(mix: TrainingMix) -> None:
    options = {"steps": 24, "window": 8, "batch_size": 1, "lr": 4e-2, "start_lam": 1.0}
    model = make_model()
    small = train_write_gate(model, mix, target_keep=0.15, **options)
    large = train_write_gate(model, mix, target_keep=0.6, **options)
    assert small.lam > large.lam
    assert small.keep < large.keep - 0.1


def test_arguments_are_checked(mix: TrainingMix) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="target_keep, lam: wanted exactly one"):
        train_write_gate(model, mix, steps=1)
    with pytest.raises(ValueError, match="target_keep: wanted more than window / length"):
        train_write_gate(model, mix, steps=1, window=64, target_keep=0.3)
    with pytest.raises(ValueError, match="tokenizer: wanted one"):
        train_write_gate(model, ["text"], steps=1, lam=0.1)
    with pytest.raises(ValueError, match="texts: wanted one of more than 100 tokens, got none"):
        TrainingMix(texts=["short"], tokenizer=mix.tokenizer, length=100)


def test_batches_are_reproducible_and_full(mix: TrainingMix) -> None:
    first, again, other = mix.batch(3, 4), mix.batch(3, 4), mix.batch(3, 4, rank=1)
    assert first.input_ids.shape == first.answers.shape == (4, 192)
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)


def test_evaluation_of_full_caches_changes_nothing(mix: TrainingMix) -> None:
    model = make_model()
    gates = WriteGates.for_model(model)
    with torch.no_grad():
        for layer in gates.layers:
            layer.conv2.bias.fill_(50)
    ids = mix.batch(0, 2).input_ids
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, -9:] = True
    with attach_for_training(model) as attached:
        result = evaluate_gates(
            attached, gates, model.lm_head, [(ids, answers)], window=8, threshold=0.1
        )
    assert result.loss < 1e-8 and result.keep == 1.0
    assert result.accuracy == result.accuracy_full


@pytest.mark.parametrize("objective", ["duo", "wgkv"])
def test_duo_training_writes_a_pattern(objective: str, tmp_path: Path, mix: TrainingMix) -> None:
    asked = TrainingMix(
        texts=mix.texts, tokenizer=mix.tokenizer, length=400, kinds={"facts": 1.0}, seed=3
    )
    pattern = train_duo_attention(
        make_model(),
        asked,
        steps=6,
        objective=objective,  # type: ignore[arg-type]
        sink_size=2,
        recent_size=8,
        lam=10.0,
    )
    assert pattern.heads.shape == (2, 2)
    assert pattern.heads.min() >= 0 and pattern.heads.mean() < (1.0 if objective == "duo" else 0.5)
    pattern.save(tmp_path)
    lines = (tmp_path / "full_attention_heads.tsv").read_text().splitlines()
    read = torch.tensor([[float(x) for x in line.split("\t")] for line in lines])
    torch.testing.assert_close(read, pattern.heads, atol=1e-6, rtol=0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["sink_size"], config["recent_size"]) == (2, 8)


def test_a_share_of_the_loss_is_taken_at_answers(tmp_path: Path) -> None:
    mix, options = make_mix(), {"steps": 1, "window": 8, "batch_size": 2, "lam": 0.1}
    train_write_gate(make_model(), mix, **options, answer_share=0.25, out_dir=tmp_path)
    loss = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    model, batch = make_model(), mix.batch(0, 2)
    assert batch.answers.any()
    with torch.no_grad(), attach_for_training(model) as attached:
        teacher = attached.hidden(batch.input_ids)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            gates = WriteGates.for_model(model)
        student = gated_forward(attached, gates, batch.input_ids, window=8).hidden
    error = (student - teacher).square().mean(-1)
    rows = [row[:-1][seen[1:]].mean() for row, seen in zip(error, batch.answers, strict=True)]
    at_answers = torch.stack([x for x in rows if not x.isnan()]).mean()
    assert loss == pytest.approx(float(0.75 * error.mean() + 0.25 * at_answers), rel=1e-4)
    assert loss != pytest.approx(float(error.mean()), rel=1e-2)
    with pytest.raises(ValueError, match=r"answer_share: wanted a number in \[0, 1\), got 1"):
        train_write_gate(make_model(), mix, **options, answer_share=1)


def test_lengths_take_turns_with_as_many_tokens(tmp_path: Path, monkeypatch) -> None:
    tokenizer, shapes = make_tokenizer(), []
    hidden = AttachedModel.hidden

    def seen(self, ids, *rule):
        shapes.append(tuple(ids.shape))
        return hidden(self, ids, *rule)

    monkeypatch.setattr(AttachedModel, "hidden", seen)
    options = {"tokenizer": tokenizer, "window": 8, "batch_size": 2}
    train_write_gate(make_model(), [TEXT], steps=4, lam=0.1, length=[96, 192], **options)
    assert shapes[::2] == shapes[1::2] == [(4, 96), (2, 192), (4, 96), (2, 192)]
    with pytest.raises(ValueError, match=r"window / length = 0.0625, got 0.06"):
        train_write_gate(
            make_model(), [TEXT], steps=1, target_keep=0.06, length=[96, 192], **options
        )
    with pytest.raises(ValueError, match=r"length: wanted one or more, .* got \[\]"):
        train_write_gate(make_model(), [TEXT], steps=1, lam=0.1, length=[], **options)
    with pytest.raises(ValueError, match=r"each at least 2, got \[0, 96\]"):
        train_write_gate(make_model(), [TEXT], steps=1, lam=0.1, length=[0, 96], **options)
    with pytest.raises(ValueError, match=r"length: a ready stream has its own, got \[96, 192\]"):
        train_write_gate(make_model(), make_mix(), steps=1, lam=0.1, length=[96, 192], **options)
