"""The demo's table, checks and picture on a tiny random model."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path

import attrs
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
tokenizers = pytest.importorskip("tokenizers")

from rich.console import Console  # noqa: E402

from kvpolicy import CachePipeline, LocalAttention, Quest, RandomGate, SnapKV  # noqa: E402
from kvpolicy.adapters.hf import attach  # noqa: E402
from kvpolicy.evaluation.look import kept_map  # noqa: E402
from kvpolicy.evaluation.look.comparison import Composition, compare, speed_ratio, work_of  # noqa: E402
from kvpolicy.evaluation.sessions.pipeline import PipelineSession  # noqa: E402
from kvpolicy.evaluation.sessions.score import AnswerScore  # noqa: E402
from kvpolicy.evaluation.tasks.prompts import Example, Question  # noqa: E402
from kvpolicy.pretrained import names, path  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WINDOW, CONTEXT, VOCABULARY = 16, 120, 90


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def examples():
    draw = torch.Generator().manual_seed(1)

    def ids(count):
        return tuple(torch.randint(0, VOCABULARY, (count,), generator=draw).tolist())

    def example():
        context = ids(CONTEXT)
        questions = tuple(Question(ids(5), context[at : at + 4]) for at in (20, 50, 80))
        return Example(context_ids=context, questions=questions)

    return [example(), example()]


@pytest.fixture(scope="module")
def rows(demo):
    gate = RandomGate(sparsity=0.5)
    both = {"selection": Quest(budget=32), "eviction": SnapKV(budget=40, observation=8)}
    return [
        Composition(name=demo.PLAIN),
        Composition(name=demo.FULL, pipeline=CachePipeline(window=WINDOW)),
        Composition(
            name=demo.LOCAL, pipeline=CachePipeline(admission=LocalAttention(window=WINDOW))
        ),
        Composition(name="no weights", missing="none of this model here"),
        Composition(name=demo.GATE, pipeline=CachePipeline(admission=gate, window=WINDOW)),
        Composition(
            name="all three", pipeline=CachePipeline(admission=gate, window=WINDOW, **both)
        ),
    ]


@pytest.fixture(scope="module")
def compared(model, rows, examples):
    work, finished = [], []
    runs = compare(
        model,
        rows,
        examples,
        rounds=2,
        round_tokens=5,
        advance=lambda doing, done: work.append(done),
        finished=lambda context, run: finished.append((context, run.composition.name)),
    )
    return {run.composition.name: run for run in runs}, work, finished


def test_full_attention_is_plain_transformers(demo, compared):
    runs, _, _ = compared
    plain, full = runs[demo.PLAIN], runs[demo.FULL]
    assert len(full.generated) == 10
    assert full.generated == plain.generated
    for mine, theirs in zip(full.answers, plain.answers, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.predicted_ids == b.predicted_ids
            assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-4)
    assert full.tokens_read == plain.tokens_read == CONTEXT + 5 + 10


def test_every_policy_takes_effect(demo, compared):
    runs, _, _ = compared
    full, local, gate, three = (
        runs[name] for name in (demo.FULL, demo.LOCAL, demo.GATE, "all three")
    )
    assert local.tokens_read == WINDOW + 4
    assert local.tokens_read < gate.tokens_read < full.tokens_read
    assert three.tokens_read <= 32
    assert local.answers != full.answers
    assert local.kept.float().mean() == pytest.approx((WINDOW + 4) / CONTEXT)
    assert full.kept.all() and not gate.kept.all()


def test_first_context_is_measured_without_its_forks(demo, model, rows, examples, compared):
    runs, _, _ = compared
    row = next(row for row in rows if row.name == demo.GATE)
    with torch.no_grad(), attach(model, row.pipeline):
        alone = PipelineSession(model, row.pipeline)
        alone.prefill(torch.tensor(examples[0].context_ids))
        alone.prefill(torch.tensor(examples[0].questions[0].question_ids))
        alone.end_prompt()
        for token in runs[demo.GATE].generated:
            alone.step(torch.tensor([token]))
        held = alone.held_bytes()
    assert runs[demo.GATE].held_bytes == held


def test_all_work_is_told(compared, rows, examples):
    _, work, finished = compared
    assert sum(work) == work_of(rows, examples, rounds=2)
    assert len(finished) == 2 * 5


def test_table_has_a_row_for_each_composition(demo, compared, rows):
    runs, _, _ = compared
    out = io.StringIO()
    Console(file=out, width=160).print(demo.table(rows, list(runs.values())))
    lines = {
        row.name: line for line in out.getvalue().splitlines() for row in rows if row.name in line
    }
    assert set(lines) == {row.name for row in rows}
    assert "none of this model here" in lines["no weights"]
    assert "100%" in lines[demo.FULL]


def test_failures_names_what_is_missing(demo, compared):
    runs, _, _ = compared
    plain, full, local = (attrs.evolve(runs[n]) for n in (demo.PLAIN, demo.FULL, demo.LOCAL))
    right = AnswerScore(predicted_ids=(1,), answer_ids=(1,), log_likelihood=0.0)
    wrong = attrs.evolve(right, predicted_ids=(2,))
    plain.answers = full.answers = [(right,)]
    local.answers = [(wrong,)]
    plain.rates, full.rates = [10.0, 20.0], [9.0, 18.0]
    assert speed_ratio(full, plain) == pytest.approx(0.9)
    assert demo.failures([plain, full, local]) == demo.warnings([plain, full, local]) == []
    full.generated = [*plain.generated[:-1], plain.generated[-1] + 1]
    local.answers = [(right,)]
    tokens, gap = demo.failures([plain, full, local])
    assert "other tokens" in tokens and "by 0.00 only" in gap
    assert demo.warnings([plain, full, local]) == []


def test_a_busy_machine_is_a_warning_and_no_failure(demo, monkeypatch, capsys, compared, examples):
    runs = {name: attrs.evolve(run) for name, run in compared[0].items()}
    right = AnswerScore(predicted_ids=(1,), answer_ids=(1,), log_likelihood=0.0)
    wrong = attrs.evolve(right, predicted_ids=(2,))
    for name, run in runs.items():
        run.answers = [(wrong if name == demo.LOCAL else right,)]
        run.rates = [7.0, 14.0] if name == demo.FULL else [10.0, 20.0]
        run.kept = None
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setattr(demo, "load_smollm2", lambda dtype: (None, None))
    monkeypatch.setattr(demo.tasks, "needles", lambda *args, **options: examples)
    monkeypatch.setattr(demo, "compositions", lambda: [run.composition for run in runs.values()])
    monkeypatch.setattr(demo, "compare", lambda *args, **options: list(runs.values()))
    assert demo.main() == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "0.70x the tokens/s" in said and "warning: full attention decoded at 0.70x" in said
    runs[demo.FULL].generated = [0]
    assert demo.main() == 1


def test_picture(demo, compared, examples, tmp_path):
    runs, _, _ = compared
    characters = [chr(33 + i) for i in range(VOCABULARY)]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?")
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    assert kept_map.answer_spans(tokenizer, examples[0]) == [(20, 24), (50, 54), (80, 84)]
    picture = tmp_path / "kept.png"
    kept_map.draw(picture, runs[demo.GATE].kept, tokenizer, examples[0], title="kept")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_shipped_policies_are_found():
    assert "duo-smollm2-135m-instruct" in names()
    for name in names():
        assert path(name).exists()
    gate = path("smollm2-135m-instruct-w64-keep25")
    assert gate.suffix == ".safetensors"
    with pytest.raises(FileNotFoundError, match="wanted one of .*keep10.*, got 'nothing'"):
        path("nothing")


def test_demo_has_the_rows_of_the_shipped_policies(demo):
    rows = demo.compositions()
    assert [row.name for row in rows][:3] == [demo.PLAIN, demo.FULL, demo.LOCAL]
    assert len(rows) == 8 and not any(row.missing for row in rows)
