"""Benchmarks end to end on a tiny model: answers, sizes, parts, tables and the command."""

from __future__ import annotations

import json
import string

import attrs
import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from typer.testing import CliRunner  # noqa: E402

from kvpolicy import CachePipeline, JudgeQ, KVzip, LocalAttention, Ratio, SnapKV  # noqa: E402
from kvpolicy.adapters.hf import attach  # noqa: E402
from kvpolicy.budget import Tokens  # noqa: E402
from kvpolicy.cli import app  # noqa: E402
from kvpolicy.evaluation.benchmarks import evictions, tables  # noqa: E402
from kvpolicy.evaluation.benchmarks.answers import Asker, ends_of, kv_footprint  # noqa: E402
from kvpolicy.evaluation.benchmarks.benchmark import Benchmark  # noqa: E402
from kvpolicy.evaluation.benchmarks.chat import Chat  # noqa: E402
from kvpolicy.evaluation.benchmarks.item import Item  # noqa: E402
from kvpolicy.evaluation.benchmarks.runner import BenchmarkRunner  # noqa: E402
from kvpolicy.evaluation.grid.parts import part_of  # noqa: E402
from kvpolicy.evaluation.grid.records import Footprint, Measured, Result  # noqa: E402
from kvpolicy.evaluation.grid.variants import Room  # noqa: E402
from kvpolicy.evaluation.models import tiny_llama  # noqa: E402
from kvpolicy.evaluation.sessions.look_back import alone  # noqa: E402
from tests.support.evaluation.small import small_gate  # noqa: E402


def small_model():
    """Its tokenizer has a hundred tokens, and it writes no others."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[100:] = 0
    return model


CHAT = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}~"
ITEMS = [
    [Item(task="t", context=f"{c} was here, {c * 3} and more. " * 3, question=f"Who {q}?",
          answers="x", lead="So", new_tokens=n) for q, n in (("came", 9), ("went home", 6))]
    for c in "ab"
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {c: i for i, c in enumerate(string.printable)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    raw.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHAT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A tiny model that writes printable characters, a gate, and questions about four contexts."""
    root = tmp_path_factory.mktemp("benchmarks")
    small_model().save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    small_gate().save(root / "gate.safetensors")
    rows = [
        {"task": task, "context": f"{c} is here; " * (12 + i), "question": q, "answer": ["e", "a"],
         "max_new_tokens": 8}
        for task in ("one", "two")
        for i, c in enumerate("pqrs")
        for q in ("Who?", "Why so?")
    ]  # fmt: skip
    (root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def call(folder, out, *options, code=0):
    words = ["evaluate", folder / "model", "--benchmark", folder / "mine.jsonl", "--out", out,
             "--device", "cpu", "--window", 16, "--minutes", 9, "--length", 400]  # fmt: skip
    done = CliRunner().invoke(app, [str(x) for x in (*words, *options)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def cells(out):
    found = json.loads((out / "results.json").read_text())["cells"]
    return {(x["task"], x["variant"]): x for x in found}


def plain(model, tokenizer, item, new):
    """transformers' own greedy answer."""
    ids = tokenizer(f"<{item.context.rstrip()}\n\n{item.question}>~{item.lead}").input_ids
    out = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("seen", [False, True])
def test_answers_are_those_of_the_plain_model(seen, tokenizer):
    model = small_model()
    wanted = [tuple(plain(model, tokenizer, x, x.new_tokens) for x in own) for own in ITEMS]
    assert len({text for own in wanted for text in own}) == 4
    chat = Chat(tokenizer, seen=seen)
    readings = [reading for own in ITEMS for reading in chat.readings(own)]
    with attach(model, CachePipeline()) as here:
        asker = Asker(here=here, tokenizer=tokenizer, after=chat.after)
        found = asker.answers(readings)
        assert asker.first_token(readings[0]) > 0
    assert [t for own in found.texts for t in own] == [t for own in wanted for t in own]
    assert found.kv_footprint == pytest.approx(1.0)
    assert found.sizes.held == 1.0 and found.sizes.read >= 1.0


@pytest.mark.parametrize("method", ["SnapKV", "KVzip", "TOVA"])
def test_contexts_read_together_answer_as_alone(method, tokenizer):
    model = small_model()
    (variant,) = [x for x in evictions.evictions([], [0.5], ["unseen"]) if x.family == method]
    pipeline = variant.build(Room(0, 0))
    readings = [reading for own in ITEMS for reading in Chat(tokenizer).readings(own)]
    with attach(model, pipeline) as here:
        asker = Asker(here=here, tokenizer=tokenizer, after=">~")
        apart = [asker.answers([reading]) for reading in readings]
        assert apart[0].sizes.held == pytest.approx(0.5, abs=0.02)
        assert apart[0].sizes.evicted > 0
        if not alone(pipeline.eviction):
            both = asker.answers(readings)
            assert both.texts == tuple(x.texts[0] for x in apart)
            assert both.sizes.held_tokens == apart[0].sizes.held_tokens


@pytest.mark.parametrize("method", ["SnapKV", "KVzip"])
def test_questions_in_slots_are_answered_alike(method, tokenizer):
    """KVzip, whose contexts are replayed, is asked in one batch."""
    model = small_model()
    (variant,) = [x for x in evictions.evictions([], [0.5], ["unseen"]) if x.family == method]
    readings = [reading for own in ITEMS for reading in Chat(tokenizer).readings(own)]
    readings[0] = attrs.evolve(readings[0], new_tokens=(9, 2))
    with attach(model, variant.build(Room(0, 0))) as here:
        asker = Asker(here=here, tokenizer=tokenizer, after=">~")
        readings = readings[:1] if alone(here.pipeline.eviction) else readings
        wanted = asker.answers(readings)
        found = attrs.evolve(asker, slots=2).answers(readings)
    assert found.texts == wanted.texts
    assert found.sizes == wanted.sizes and found.kv_footprint == wanted.kv_footprint
    assert (found.held_after < wanted.held_after) == (method == "SnapKV")


def test_an_eviction_decides_by_the_question_only_where_it_is_seen(tokenizer):
    """With it unseen, what is kept does not depend on the question; seen, the prompt has it."""
    unseen, seen = (Chat(tokenizer, seen=x).readings(ITEMS[0]) for x in (False, True))
    assert len(unseen) == 1 and len(seen) == 2
    pipeline = CachePipeline(eviction=SnapKV(budget=40, observation=8))
    with attach(tiny_llama(), pipeline) as here:
        asker = Asker(here=here, tokenizer=tokenizer)
        one, two = asker.answers(unseen).sizes, asker.answers(seen[:1]).sizes
    assert two.seen_tokens == one.seen_tokens + len("\n\nWho came?")
    assert one.held_tokens == two.held_tokens == 40


def test_every_end_of_a_reply_ends_it_and_penalties_are_off(tokenizer):
    model = small_model()
    reading = Chat(tokenizer).readings(ITEMS[0])
    with attach(model, CachePipeline()) as here:
        ((first, second),) = Asker(here=here, tokenizer=tokenizer).answers(reading).texts
    model.generation_config.repetition_penalty = 9.0
    ends = [tokenizer.convert_tokens_to_ids(text[2]) for text in (first, second)]
    model.generation_config.eos_token_id = ends
    assert ends_of(model, tokenizer) == {*ends}
    with attach(model, CachePipeline()) as here:
        ((one, two),) = Asker(here=here, tokenizer=tokenizer).answers(reading).texts
    cut = [min(x.find(c) for c in (first[2], second[2]) if c in x) for x in (first, second)]
    assert (one, two) == (first[: cut[0]], second[: cut[1]])


def test_the_kv_footprint_is_entries_times_steps(tokenizer):
    tokens, asked, window = 90, 30, 16
    ids = torch.randint(0, 100, (1, tokens), generator=torch.Generator().manual_seed(0))
    full = sum(t for t in range(1, tokens + asked + 1))

    def measured(pipeline):
        with attach(tiny_llama(), pipeline) as here:
            return kv_footprint(here.read(ids).report(), here.pipeline.window, asked)

    held = [min(t, window) for t in range(1, tokens + 1)]
    local = sum(held) + sum(held[-1] + t for t in range(1, asked + 1))
    found = measured(CachePipeline(admission=LocalAttention(window=window, sinks=0)))
    assert found == pytest.approx(local / full)
    # All of the context until it ends, then 40 of it.
    cut = sum(range(1, tokens + 1)) + sum(40 + t for t in range(1, asked + 1))
    found = measured(CachePipeline(eviction=SnapKV(budget=40, observation=8)))
    assert found == pytest.approx(cut / full)


def test_what_a_ratio_leaves_is_decided_when_the_prompt_ends():
    made = [method.at_prompt_end(Tokens(64)) for method in evictions.METHODS.values()]
    assert {policy.when for policy in made} == {"prompt_end"} and len(made) > 15


def test_a_run_makes_a_table_a_plot_and_goes_on(folder, tmp_path):
    gate = ("--gate", folder / "gate.safetensors", "--variant", "full", "--variant", "gate gate")
    evict = ("--variant", "SnapKV (gate", "--variant", "KeyDiff, question seen 75%",
             "--variant", "KVzip 50%")  # fmt: skip
    said = call(folder, tmp_path, *gate, *evict).stdout
    assert "10 cells, 0 failed, 0 left" in said and said.count("score ") == 10
    found = cells(tmp_path)
    full, gated = found["one", "full"], found["one", "gate gate"]
    assert full["questions"] == 8 and full["contexts"] == [0, 1, 2, 3]
    assert full["kv_footprint"] == pytest.approx(1.0) and gated["kv_footprint"] < 1
    assert 0 < gated["held_tokens"] < full["held_tokens"] == full["seen_tokens"]
    assert full["first_token"] > 0 and full["dropped"] == 0
    keydiff = found["one", "KeyDiff, question seen 75% removed"]
    assert keydiff["held_tokens"] / keydiff["seen_tokens"] == pytest.approx(0.25, abs=0.02)
    assert found["two", "SnapKV (gate gate)"]["kv_bytes"] <= found["two", "gate gate"]["kv_bytes"]
    text = (tmp_path / "results.md").read_text()
    assert "## Mean over tasks, 400 tokens" in text and "## one, 400 tokens" in text
    assert "| KVzip 50% removed |" in text
    assert (tmp_path / "score-over-bytes.png").read_bytes()[:4] == b"\x89PNG"
    assert call(folder, tmp_path, *gate, *evict).stdout.count("score ") == 0
    wrong = call(folder, tmp_path, *gate, "--contexts", 3, code=2).stderr
    assert "another contexts: 25" in wrong


def test_parts_merge_to_the_whole(folder, tmp_path, monkeypatch):
    chosen = ("--variant", "full", "--variant", "SnapKV 50%", "--variant", "local")
    call(folder, tmp_path / "whole", *chosen)
    said = call(folder, tmp_path / "parts", *chosen, "--part", "1/2").stdout
    assert "1 of 2 parts missing" in said
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = call(folder, tmp_path / "parts", *chosen).stdout
    assert "0 failed, 0 left\n" in said
    whole, parts = cells(tmp_path / "whole"), cells(tmp_path / "parts")
    assert whole.keys() == parts.keys() and len(whole) == 2 * 4
    for key, one in whole.items():
        other = parts[key]
        assert one["score"] == other["score"] and one["contexts"] == other["contexts"]
        assert one["questions"] == other["questions"] == 8
        assert other["held_tokens"] == pytest.approx(one["held_tokens"])
        assert other["kv_footprint"] == pytest.approx(one["kv_footprint"], rel=0.02)
    assert (tmp_path / "parts" / "score-over-bytes.png").exists()
    wrong = call(folder, tmp_path / "parts", *chosen, "--seed", 1, "--part", "1/2", code=2).stderr
    assert "another seed: 0" in wrong


def test_a_cell_that_fails_makes_the_exit_code_one(folder, tmp_path):
    """Its question and reply do not fit into the length that contexts are cut to."""
    said = call(folder, tmp_path, "--variant", "full", "--length", 12, code=1).stdout
    assert "failed: one: 12 tokens hold no context" in said and "2 failed" in said


def test_a_policy_of_one_s_own(folder, tmp_path, monkeypatch):
    (tmp_path / "ours.py").write_text(
        "from kvpolicy import CachePipeline, KeyDiff, Ratio\n"
        "evict = KeyDiff(budget=Ratio(0.5))\n"
        "whole = CachePipeline(window=8)\nnone = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    call(folder, tmp_path / "out", "--policy", "ours:evict", "--policy", "ours:whole",
         "--variant", "ours", "--task", "one")  # fmt: skip
    found = cells(tmp_path / "out")
    assert set(found) == {("one", "ours:evict"), ("one", "ours:whole")}
    assert found["one", "ours:evict"]["evicted"] > 0 == found["one", "ours:whole"]["evicted"]
    wrong = call(folder, tmp_path / "out", "--policy", "ours:none", code=2).stderr
    assert "policy: wanted a policy or a CachePipeline in ours:none, got 3" in wrong


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--eager",), "eager: wanted without --benchmark"),
        (("--methods",), "methods: wanted without --benchmark"),
        (("--ratio", 1), "ratio: wanted less than 1"),
        (("--part", "2/2"), "part: wanted i/n with i from 0 to n - 1"),
        (("--task", "three"), "task: wanted one of one, two, got 'three'"),
        (("--length", 9000), "length: wanted at most the model's 8192 positions"),
    ],
)
def test_what_is_refused(options, said, folder, tmp_path):
    assert said in call(folder, tmp_path / "out", *options, code=2).stderr


def test_options_of_benchmarks_want_one():
    done = CliRunner().invoke(app, ["evaluate", "--ratio", "0.5"])
    assert done.exit_code == 2 and "ratio: wanted with --benchmark" in done.stderr


def test_the_part_is_given_or_a_launcher_s():
    assert part_of(None, {}) == (0, 1)
    assert part_of("2/3", {"RANK": "0", "WORLD_SIZE": "8"}) == (2, 3)
    assert part_of(None, {"RANK": "5", "WORLD_SIZE": "8"}) == (5, 8)
    assert part_of(None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == (1, 2)
    for wrong in ("3/3", "1", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="part: wanted i/n"):
            part_of(wrong, {})


def result(task, variant, scores, taken=1.0):
    sizes = Footprint(held_tokens=1, seen_tokens=2, read_tokens=1, bytes=taken, kv_bytes=1,
                      slots=1, admitted=1, evicted=0)  # fmt: skip
    measured = Measured(scores={"score": scores}, footprint=sizes, seconds=1, questions=2,
                        contexts=(0, 1), kv_footprint=0.5, first_token=0.1, dropped=0)  # fmt: skip
    return Result(task=task, length=9, variant=variant, family=variant, keep=1, seed=0,
                  measured=measured)  # fmt: skip


def test_a_ratio_counts_only_where_full_attention_scores_half():
    rows = [
        result("high", "full", (1.0, 0.6)),
        result("high", "gate", (0.4, 0.4)),
        result("low", "full", (0.4, 0.4)),
        result("low", "gate", (0.4, 0.8)),
    ]
    full, gate = tables.means(rows, 9)
    assert (gate.counted, gate.tasks) == (1, 2)
    assert gate.part.mean == pytest.approx(0.5) and gate.score.mean == pytest.approx(0.5)
    # Standard errors 0 and 0.2 of two tasks.
    assert gate.score.standard_error == pytest.approx(0.1)
    assert full.part.mean == 1.0
    text = tables.summary({"settings": {"a": 1}, "made_with": []}, rows, "title")
    (line,) = [x for x in text.split("## low")[1].split("\n") if x.startswith("| gate")]
    assert "1.500 ± " in line and ", not counted" in line
    (line,) = [x for x in text.split("## high")[1].split("## low")[0].split("\n") if "| gate" in x]
    assert "not counted" not in line


def test_a_mean_of_fewer_tasks_does_not_stand_beside_the_others():
    rows = [result(task, "full", (1.0, 1.0)) for task in ("a", "b")]
    rows.append(result("a", "gate", (0.9, 0.9)))
    text = tables.summary({"settings": {}, "made_with": []}, rows, "title")
    mean, _, of_tasks = text.partition("## a, 9 tokens")
    assert "| full |" in mean and "| gate |" not in mean and "| gate |" in of_tasks
    assert "Measured on fewer tasks: gate (1)." in mean


def test_only_what_repeats_a_context_is_read_alone():
    kvzip, judge = KVzip(budget=Ratio(0.5)), JudgeQ(budget=64, embeds=torch.ones(2, 8))
    assert alone(kvzip) and not alone(judge) and not alone(SnapKV(budget=64))


@attrs.frozen
class One(Benchmark):
    """As many contexts as are wanted, `each` questions about every one."""

    each: int

    def tasks(self, data=()):
        return ("one",)

    def items(self, task, wanted):
        return [
            Item(task=task, context=f"context {c}", question=f"{q}?", answers="x")
            for c in range(wanted.contexts)
            for q in range(self.each)
        ]

    def score(self, answer, item):
        return 0.0


@pytest.mark.parametrize(
    ("each", "questions", "contexts"), [(1, 200, 200), (8, 200, 25), (3, 200, 67), (1, 0, 25)]
)
def test_a_task_of_few_questions_gets_more_contexts(each, questions, contexts):
    run = BenchmarkRunner(
        model=None, tokenizer=None, text="", contexts=25, seed=0, deadline=0.0, store=None,
        results=[], benchmark=One(each), questions=questions,
    )  # fmt: skip
    found = run._asked("one", 100)
    assert len(found) == contexts and sum(len(own) for _, own in found) >= questions
    parts = [attrs.evolve(run, items={}, part=(n, 3))._asked("one", 100) for n in range(3)]
    assert sorted(place for part in parts for place, _ in part) == list(range(contexts))
