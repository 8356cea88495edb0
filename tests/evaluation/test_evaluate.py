"""The command's cells: batched questions score as single ones, sizes match, runs resume."""

from __future__ import annotations

import json
import string

import pytest
import torch

from tests.support.evaluation.small import small_gate

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from typer.testing import CliRunner  # noqa: E402

from kvpolicy import (  # noqa: E402
    CachePipeline,
    LocalAttention,
    Quest,
    SnapKV,
    WriteGate,
    XAttention,
)
from kvpolicy.adapters.hf import attach  # noqa: E402
from kvpolicy.cli import app, record  # noqa: E402
from kvpolicy.evaluation.grid import cell, densities, runner, together  # noqa: E402
from kvpolicy.evaluation.grid import variants as grid  # noqa: E402
from kvpolicy.evaluation.models import tiny_llama  # noqa: E402
from kvpolicy.evaluation.sessions import estimates  # noqa: E402
from kvpolicy.evaluation.sessions.pipeline import PipelineSession  # noqa: E402
from kvpolicy.evaluation.sessions.score import score  # noqa: E402
from kvpolicy.evaluation.tasks import TASKS, Task  # noqa: E402
from kvpolicy.evaluation.tasks import loss as long_text  # noqa: E402
from kvpolicy.evaluation.tasks.prompts import Example, Frame, Question  # noqa: E402
from kvpolicy.testing import check_selection  # noqa: E402

BUDGETED = ("Quest", "SnapKV", "SnapKV, question seen", "Quest + SnapKV")
CHAT = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}~"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer of characters, and a text."""
    root = tmp_path_factory.mktemp("evaluate")
    tiny_llama().save_pretrained(root / "model")
    vocabulary = {c: i for i, c in enumerate(string.printable)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    raw.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHAT)
    tokenizer.save_pretrained(root / "model")
    names = [a + b + c for a in "abcdefgh" for b in "aeiou" for c in "klmnprst"]
    (root / "texts").mkdir()
    text = "\n\n".join(f"The {name} went home. It saw many a {name}ing." for name in names)
    (root / "texts" / "one.txt").write_text(text)
    return root


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(2)

    def ids(count):
        return tuple(torch.randint(0, 512, (count,), generator=generator).tolist())

    sizes = ((5, 4), (9, 1), (7, 6))
    return [
        Example(context_ids=ids(90), questions=tuple(Question(ids(q), ids(a)) for q, a in sizes))
        for _ in range(2)
    ]


@pytest.mark.parametrize("in_prompt", [True, False])
@pytest.mark.parametrize(
    "pipeline",
    [
        CachePipeline(admission=LocalAttention(window=16, sinks=2)),
        CachePipeline(window=16, selection=Quest(budget=48)),
        CachePipeline(window=16, eviction=SnapKV(budget=40, observation=8)),
    ],
    ids=["local", "quest", "snapkv"],
)
def test_questions_asked_together_score_as_alone(pipeline, in_prompt, examples):
    model = tiny_llama()
    with attach(model, pipeline):
        alone = score(
            lambda: PipelineSession(model, pipeline), examples, question_in_prompt=in_prompt
        )
    row = cell.answer(model, pipeline, examples, question_in_prompt=in_prompt)
    for at, context in enumerate(alone.answers):
        likelihood = sum(a.log_likelihood for a in context) / len(context)
        assert row.scores["log_likelihood"][at] == pytest.approx(likelihood, abs=1e-4)
        accuracy = sum(a.token_accuracy for a in context) / len(context)
        assert row.scores["accuracy"][at] == pytest.approx(accuracy)
    assert row.footprint.seen_tokens == 96 and row.questions == 6
    held = {"LocalAttention": 18, "Quest": 96, "SnapKV": 41 if in_prompt else 46}
    policies = (pipeline.admission, pipeline.selection, pipeline.eviction)
    name = next(type(p).__name__ for p in policies if not p.neutral)
    size = row.footprint
    assert size.held_tokens == held[name]
    assert size.read_tokens <= (48 if name == "Quest" else size.held_tokens)


def test_hit_tokens_repeat_a_trigram_that_is_far():
    far = 6
    #                    0  1  2  3  4  5  6  7  8  9 10 11 12 13
    ids = torch.tensor([1, 2, 3, 4, 5, 6, 1, 2, 3, 9, 8, 1, 2, 3])
    assert long_text.hit_tokens(ids, far).nonzero().flatten().tolist() == []
    assert long_text.hit_tokens(ids, 5).nonzero().flatten().tolist() == [8]
    assert long_text.hit_tokens(ids, 4).nonzero().flatten().tolist() == [8, 13]


def test_losses_are_those_of_one_forward(monkeypatch):
    model, ids = tiny_llama(), torch.arange(70) * 11 % 512
    monkeypatch.setitem(long_text._LOGITS, "cpu", 32)
    texts = [ids, ids.flip(0)]
    row = cell.read_text(model, CachePipeline(window=8), texts)
    with torch.no_grad():
        want = [model(x[None], labels=x[None]).loss.item() for x in texts]
    assert row.scores["loss"] == pytest.approx(want, abs=1e-4) and row.scores["hit_loss"] == ()
    assert row.footprint.held_tokens == row.footprint.seen_tokens == 69


def test_the_most_informative_cells_come_first():
    rows = grid.variants([], None, [0.25], [0.125, 0.25], 64)
    tasks = [TASKS[name] for name in ("key-value", "eight needles", "loss")]
    lengths = [1024, 2048, 4096]
    found = grid.cells(tasks, lengths, rows)
    gates = [("a", None), ("b", None)]
    named = [row.name for row in grid.variants(gates, None, [], [0.125], 64)]
    assert named.index("gate b") < named.index("local (gate a)") < named.index("local (gate b)")
    assert named[-1] == "gate a + Quest + SnapKV at 0.125"
    admissions = ["full", "local 25%", "random 25%", "SnapKV 25%"]
    ranks = {cell.key: at for at, cell in enumerate(found)}
    assert [cell.key for cell in found[:8]] == [
        ("eight needles", length, name) for length in (2048, 4096) for name in admissions
    ]
    eighth = ["Quest at 0.125", "SnapKV at 0.125"]
    assert [cell.key for cell in found[8:10]] == [("eight needles", 4096, x) for x in eighth]
    losses = [cell for cell in found if cell.task is TASKS["loss"]]
    assert {cell.variant.name for cell in losses} == {"full", "local 25%", "random 25%"}
    assert [cell.task.name for cell in found[10:19]] == ["loss"] * 9
    assert len(found) == 2 * 3 * len(rows) + 3 * 3
    assert ranks["key-value", 1024, "full"] < ranks["eight needles", 2048, "Quest at 0.25"]


@pytest.mark.parametrize("keep", [0.5, 0.7])
def test_matched_families_take_as_many_bytes(keep, examples):
    """Random decisions made to be half a page off on average differ by some; others by a page."""
    model = tiny_llama()
    token = 2 * 4 * 32 * 4  # keys and values, layers x heads, channels, bytes
    for variant in grid.variants([], None, [keep], [keep], 16)[1:]:
        room = grid.Room(keep * 96, 96, 0 if variant.family.endswith("cap") else 6)
        got = cell.answer(
            model,
            variant.build(room),
            examples,
            question_in_prompt=variant.question_in_prompt,
        ).footprint
        assert got.slots == pytest.approx(got.kv_bytes / token - 32, abs=1)
        if "Quest" in variant.family:
            assert room.slots - 16 < got.read_tokens <= room.slots
        if "Quest" not in variant.family or "SnapKV" in variant.family:
            unseen = not variant.question_in_prompt and variant.family.endswith("cap")
            grown = 6 if unseen else 0
            assert got.slots == pytest.approx(room.slots + grown, abs=17), variant.name
            assert got.held_tokens <= got.slots
        assert variant.build(grid.Room(2, 96)) is None


def call(folder, out, *arguments, code=0):
    options = [
        "evaluate", folder / "model", "--texts", folder / "texts", "--out", out, "--window", 16,
        "--device", "cpu", "--keep", 0.5, "--budget", 0.25,
        "--task", "copy", "--task", "loss", *arguments,
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(x) for x in options], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_a_run_is_boxed_resumed_and_summarized(folder, tmp_path):
    sizes = ("--contexts", 2, "--length", 420)
    said = call(folder, tmp_path, *sizes, "--minutes", 0).stdout
    assert "0 cells, 0 failed, 12 left; out of --minutes, the same command goes on\n" in said
    said = call(folder, tmp_path, *sizes, "--minutes", 5).stdout
    assert "12 cells, 0 failed, 0 left" in said and said.count("copy, 420: ") == 9
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    rows = {(r["task"], r["variant"]): r for r in map(json.loads, lines)}
    assert len(rows) == len(lines) == 12
    full, local = rows["copy", "full"], rows["copy", "local 50%"]
    assert full["held_tokens"] == full["seen_tokens"] > 420
    assert local["held_tokens"] == 224 - 16 + 4 and local["bytes"] < full["bytes"]
    assert len(full["accuracy"]) == 2
    assert len(rows["loss", "full"]["loss"]) == 2

    text = (tmp_path / "results.md").read_text()
    assert (
        f"| local 50% | {local['held_tokens'] / local['seen_tokens']:.1%} |" in text
        and estimates.shown(local["accuracy"]) in text
    )
    part = estimates.ratio(local["accuracy"], full["accuracy"])
    assert f"| {estimates.said(part)} | 2 |" in text
    for name in ("copy.png", "loss.png", "read.png", "cap.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    record = json.loads((tmp_path / "results.json").read_text())
    assert len(record["cells"]) == 12 and {row["seed"] for row in record["cells"]} == {0}
    assert len(record["settings"]["text"]) == 16 and record["settings"]["dtype"] == "float32"
    assert record["made_with"][0]["torch"] == torch.__version__

    # What an interrupted run left is measured again, the rest is not.
    (tmp_path / "cells.jsonl").write_text("\n".join(lines[:11]) + "\n" + lines[11][:20])
    said = call(folder, tmp_path, *sizes, "--minutes", 5).stdout
    assert "12 cells, 0 failed, 0 left" in said and said.count(", 420: ") == 1
    assert call(folder, tmp_path, *sizes).stdout.count(", 420: ") == 0
    wrong = call(folder, tmp_path, "--contexts", 3, code=2).stderr
    assert "error: out: " in wrong and "another contexts: 2" in wrong


def test_forced_densities_read_the_heaviest_blocks(folder, tmp_path):
    options = ("--length", 700, "--contexts", 1, "--density", 0.5, "--density", 1)
    said = call(folder, tmp_path, *options).stdout
    assert "8 cells, 0 failed, 0 left" in said
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    rows = {(r["task"], r["variant"]): r for r in map(json.loads, lines)}
    tiles = range(1, 7)  # of 128 positions; the question lies in the last one too
    wanted = sum(max(round(0.5 * n), min(n, 2)) for n in tiles) / sum(tiles)
    for task in ("copy", "loss"):
        assert rows[task, "XAttention at 50%"]["density"] == [pytest.approx(wanted)]
        assert rows[task, "XAttention at 100%"]["density"] == [1.0]
        assert 0 < rows[task, "XAttention, threshold 0.9"]["density"][0] <= 1
        assert "density" not in rows[task, "full"]
    loss = {name: row["loss"] for (task, name), row in rows.items() if task == "loss"}
    assert loss["XAttention at 100%"] == pytest.approx(loss["full"], abs=1e-4)
    assert loss["XAttention at 50%"] != pytest.approx(loss["full"], abs=1e-4)
    assert "density" in (tmp_path / "results.md").read_text()
    for wrong in (("--density", 0), ("--density", 0.5, "--methods")):
        assert "error: density: " in call(folder, tmp_path, *wrong, code=2).stderr


@pytest.mark.slow
def test_methods_in_parts_make_one_table_and_name_what_is_left_out(folder, tmp_path):
    options = (
        "--length", 420, "--contexts", 1, "--methods", "--keep", 0.5, "--page-size", 4,
        "--task", "copy",  # which stands in `call` too, and counts once
        "--variant", "full", "--variant", "KVzip", "--variant", "KeyDiff 0.5",
    )  # fmt: skip
    said = call(folder, tmp_path, *options, "--part", "0/2").stdout
    assert "left out: Q-Filters (wants a file of the model" in said
    assert "1 of 2 parts missing" in said
    said = call(folder, tmp_path, *options, "--part", "1/2").stdout
    assert "results.md: 4 cells, 0 failed, 0 left\n" in said
    text = (tmp_path / "results.md").read_text()
    table = text[text.index("## Methods at 0.5 of the cache, the question unseen") :]
    assert all(f"| {name} | " in table for name in ("full", "KVzip", "KeyDiff"))
    assert "Left out: Q-Filters (wants a file" in text
    whole = json.loads((tmp_path / "results.json").read_text())
    assert {x["variant"] for x in whole["cells"]} == {"full", "KVzip 0.5", "KeyDiff 0.5"}
    assert "file: wanted --methods" in call(folder, tmp_path, "--file", "KVzap=x", code=2).stderr


def test_the_heaviest_blocks():
    mass = torch.tensor([[0.1, 0.2, 0.3, 0.2, 0.1, 0.1], [0.0, 0.5, 0.1, 0.1, 0.3, 0.0]])
    found = densities.heaviest(mass, 0.5).int().tolist()
    assert found == [[1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 1]]
    assert densities.heaviest(mass, 0.01).sum(-1).tolist() == [2, 2]
    assert densities.heaviest(mass[:, :1], 0.01).all()


def test_a_forced_density_conforms():
    check_selection(densities.Forced(density=0.3, by=XAttention(tile=16)), takes_effect=True)


def test_a_task_that_does_not_fit_fails_with_the_reason_and_is_tried_again(folder, tmp_path):
    said = call(folder, tmp_path, "--contexts", 1, "--length", 40, code=1).stdout
    assert "copy, 40: full: failed: length: got 40 tokens, too few" in said
    assert "3 cells, 9 failed, 0 left" in said  # the loss needs no more
    assert "| full | length: got 40 tokens" in (tmp_path / "results.md").read_text()
    again = call(folder, tmp_path, "--contexts", 1, "--length", 40, code=1).stdout
    assert again.count("copy, 40: ") == 9 and "loss, 40: " not in again
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 3 + 2 * 9
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 12


def test_a_cell_that_fails_is_measured_by_the_next_run(folder, tmp_path, monkeypatch):
    options = ("--length", 420, "--contexts", 1, "--variant", "full", "--variant", "local")
    measure = runner.answer

    def broken(model, pipeline, examples, **options):
        if not pipeline.admission.neutral:
            raise torch.OutOfMemoryError("no more memory")
        return measure(model, pipeline, examples, **options)

    monkeypatch.setattr(runner, "answer", broken)
    said = call(folder, tmp_path, *options, code=1).stdout
    assert "copy, 420: local 50%: failed: no more memory" in said
    assert "3 cells, 1 failed, 0 left" in said
    monkeypatch.undo()
    said = call(folder, tmp_path, *options).stdout
    assert said.count(", 420: ") == 1 and "4 cells, 0 failed, 0 left" in said
    assert "no more memory" not in (tmp_path / "results.md").read_text()
    assert "4 cells, 0 failed, 0 left" in call(folder, tmp_path, *options).stdout


def test_what_takes_the_bytes_of_a_failed_cell_fails_too(folder, tmp_path, monkeypatch):
    small_gate().save(tmp_path / "some.safetensors")
    measure = runner.answer

    def broken(model, pipeline, examples, **options):
        if isinstance(pipeline.admission, WriteGate):
            raise ValueError("the gate broke")
        return measure(model, pipeline, examples, **options)

    monkeypatch.setattr(runner, "answer", broken)
    options = ("--length", 420, "--contexts", 1, "--gate", tmp_path / "some.safetensors")
    said = call(folder, tmp_path / "out", *options, "--variant", "local", code=1).stdout
    assert "copy, 420: local (gate some): failed: it takes the bytes of gate some, which" in said


def test_unknown_tasks_are_named(folder, tmp_path):
    wrong = call(folder, tmp_path, "--task", "chess", code=2).stderr
    assert wrong.startswith("error: task: wanted ") and "chess" in wrong


def test_questions_set_the_contexts_and_variants_are_chosen(folder, tmp_path):
    options = ("--length", 420, "--variant", "full", "--variant", "local", "--questions", 9)
    said = call(folder, tmp_path, *options).stdout
    assert "4 cells, 0 failed, 0 left" in said
    rows = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert {row["variant"] for row in rows} == {"full", "local 50%"}
    assert {row["questions"] for row in rows if row["task"] == "copy"} == {16}
    for names in (("x",), ("full", "x")):
        wrong = call(folder, tmp_path / "b", *(w for n in names for w in ("--variant", n)), code=2)
        assert wrong.stderr.startswith("error: variant: wanted the start of one of full")
        assert wrong.stderr.endswith("; got x\n")


def test_a_task_of_one_s_own(folder, tmp_path, monkeypatch):
    """Its record beside the others, by name."""

    def make(tokenizer, text, *, length, contexts, seed):
        frame = Frame(tokenizer)
        opening = frame.opening(text[:90])
        ask = frame.ask("Who went home?", lead="Who? ", answer="aka.")
        return [Example(context_ids=opening, questions=(ask,))] * contexts

    monkeypatch.setitem(TASKS, "mine", Task(name="mine", make=make, questions=1))
    options = ("--task", "mine", "--length", 420, "--contexts", 2, "--variant", "full")
    said = call(folder, tmp_path, *options).stdout
    assert "mine, 420: full: accuracy" in said and "0 failed" in said


def test_pages_are_as_large_as_asked_for(folder, tmp_path):
    options = ("--length", 436, "--contexts", 1, "--variant", "full", "--variant", "local")
    call(folder, tmp_path, *options, "--page-size", 4)
    rows = json.loads((tmp_path / "results.json").read_text())["cells"]
    local = next(r for r in rows if (r["task"], r["variant"]) == ("copy", "local 50%"))
    assert local["held_tokens"] == 220 <= local["slots"] < 224  # 55 pages of 4 hold half of 436
    wrong = call(folder, tmp_path, *options, code=2).stderr
    assert "another page_size: 4" in wrong


def test_gates_are_measured_at_each_threshold(folder, tmp_path):
    small_gate().save(tmp_path / "some.safetensors")
    options = ("--length", 420, "--contexts", 1, "--gate", tmp_path / "some.safetensors")
    options += ("--variant", "gate some over", "--threshold", 0.6, "--threshold", 0.45)
    call(folder, tmp_path / "out", *options)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    held = {row["variant"]: row["held_tokens"] for row in rows if row["task"] == "copy"}
    assert held["gate some over 0.6"] < held["gate some over 0.45"] < 420
    assert "gate some over 0.45 + Quest at 0.25" in held  # behind the largest gate


def test_gates_that_are_not_installed_are_left_out(monkeypatch):
    """A wheel holds one of the shipped gates; nothing is asked of the hub for the others."""
    (here, *others) = runner.SHIPPED_GATES.values()
    assert runner.absent_gates() == []
    monkeypatch.setattr(runner, "names", lambda: [here])
    assert runner.absent_gates() == others
    gates = [
        found.name.split("%")[0]
        for found in runner.variants_for("smollm2", [], [], None, [0.25], [0.25], 64)
        if found.name.startswith("gate ") and "%" in found.name
    ]
    assert set(gates) == {"gate 25"}


@pytest.mark.parametrize(
    ("thought", "fits", "sizes"),
    [
        (3, 3, [3, 2, 2]),  # 7 items are dealt out evenly
        (7, 3, [3, 2, 2]),  # 7 do not fit, nor does anything above 3
        (7, 2, [1] * 7),  # nor do 3, the half of 7
    ],
)
def test_groups_are_halved_where_memory_runs_out(monkeypatch, thought, fits, sizes):
    seen = []

    def read(group):
        if len(group) > fits:
            raise torch.OutOfMemoryError
        seen.append(len(group))
        return list(group)

    monkeypatch.setattr(together, "at_a_time", lambda *given: thought)
    found = together.in_groups(None, None, range(7), 1, read)
    assert seen == sizes and [x for group in found for x in group] == list(range(7))


def test_an_item_that_does_not_fit_alone_is_an_error(monkeypatch):
    def read(group):
        raise torch.OutOfMemoryError(f"{len(group)} of them")

    monkeypatch.setattr(together, "at_a_time", lambda *given: 4)
    with pytest.raises(torch.OutOfMemoryError, match="1 of them"):
        together.in_groups(None, None, range(4), 1, read)


@pytest.mark.parametrize(
    ("starts", "named"),
    [
        (["gate a"], ["gate a"]),
        (["gate a +"], [f"gate a + {x} at 0.125" for x in BUDGETED]),
        (["gate b", "local (gate a)"], ["gate a", "gate b", "local (gate a)"]),
    ],
)
def test_a_name_chooses_its_composition_alone(starts, named):
    rows = grid.variants([("a", None), ("b", None)], None, [], [0.125], 64)
    assert [x.name for x in record.chosen(rows, starts)] == named
