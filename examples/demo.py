"""Cache policies side by side on SmolLM2-135M-Instruct and real text; minutes on two CPU cores.

    python examples/demo.py

Facts (7-digit numbers) are hidden in prose of the Python language reference, 2048 tokens a context.
Every row of the table reads each context with its own admission and answers the same questions.
Exits with 1 if the library's full attention is not that of plain transformers, or tells itself too
little from local attention; decoding that is slow beside plain transformers' is a warning, since it
may be the machine that is busy. Saves a picture of what the write gate kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvpolicy import (
    Adaptive,
    CachePipeline,
    DuoAttention,
    LocalAttention,
    Quest,
    SnapKV,
    Tokens,
    WriteGate,
)
from kvpolicy.evaluation import tasks, texts
from kvpolicy.evaluation.look import kept_map
from kvpolicy.evaluation.look.comparison import Composition, Run, compare, speed_ratio, work_of
from kvpolicy.evaluation.models import load_smollm2
from kvpolicy.pretrained import path

PLAIN, FULL, LOCAL, GATE = "plain transformers", "full", "local", "write gate"
GATE_FILE, DUO_FOLDER = "smollm2-135m-instruct-w64-keep25", "duo-smollm2-135m-instruct"
READ, KEPT = 384, 256  # tokens per head, the gate's window of 64 included
QUEST = Quest(budget=READ)
# A wide pool keeps all digits of a number of which the question attends to one.
SNAPKV = SnapKV(budget=Adaptive(Tokens(KEPT)), observation=32, kernel=15, pooling="max")
LEAST_GAP, LEAST_SPEED = 0.5, 0.8
ROUND_TOKENS = 8
SEED = 7  # of the documents; the budgets above were chosen on those of seed 0
LOG_WIDTH = 104


def compositions() -> list[Composition]:
    """The rows; one whose trained weights are not here says so."""
    rows = [
        Composition(name=PLAIN, detail="DynamicCache, SDPA"),
        Composition(name=FULL, detail="admits all", pipeline=CachePipeline()),
        Composition(
            name=LOCAL,
            detail="4 sinks + last 256",
            pipeline=CachePipeline(admission=LocalAttention(sinks=4, window=256)),
        ),
    ]
    try:
        duo = DuoAttention.from_pretrained(path(DUO_FOLDER), sparsity=0.5)
    except FileNotFoundError:
        rows.append(Composition(name="DuoAttention", missing="no head pattern of this model here"))
    else:
        detail = f"half the heads; {duo.sinks} sinks + {duo.window}"
        rows.append(
            Composition(name="DuoAttention", detail=detail, pipeline=CachePipeline(admission=duo))
        )
    names = (GATE, "gate + Quest", "gate + SnapKV", "all three")
    try:
        gate = WriteGate.from_pretrained(path(GATE_FILE))
    except FileNotFoundError:
        return rows + [Composition(name=n, missing="no gate of this model here") for n in names]
    pipelines = (
        CachePipeline(admission=gate),
        CachePipeline(admission=gate, selection=QUEST),
        CachePipeline(admission=gate, eviction=SNAPKV),
        CachePipeline(admission=gate, selection=QUEST, eviction=SNAPKV),
    )
    details = (
        f"learned, window {gate.window}",
        f"reads at most {READ} per head",
        f"keeps {KEPT} per head on average",
        "both",
    )
    return rows + [
        Composition(name=name, detail=detail, pipeline=pipeline)
        for name, detail, pipeline in zip(names, details, pipelines, strict=True)
    ]


def table(rows: list[Composition], runs: list[Run]) -> Table:
    """One row a composition."""
    done = {run.composition.name: run for run in runs}
    full = done[FULL].held_bytes
    out = Table(title="SmolLM2-135M-Instruct, fp32, CPU", title_style="bold", box=box.SIMPLE_HEAD)
    out.add_column("composition", no_wrap=True)
    out.add_column("what it does", style="dim", ratio=1)
    for name in (
        "answer\ntokens right",
        "exact",
        "cache\nMB",
        "of\nfull",
        "read\n/step",
        "tokens\n/s",
    ):
        out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.missing:
            out.add_row(row.name, row.missing)
            continue
        run = done[row.name]
        answers = [answer for context in run.answers for answer in context]
        out.add_row(
            row.name,
            row.detail,
            str(run.score.token_accuracy),
            f"{sum(a.exact_match for a in answers)}/{len(answers)}",
            f"{run.held_bytes / 1e6:.1f}",
            f"{run.held_bytes / full:.0%}",
            f"{run.tokens_read:,.0f}",
            f"{run.tokens_per_second:.1f}",
        )
    return out


def failures(runs: list[Run]) -> list[str]:
    """What the library promises of answers and this run did not show."""
    done = {run.composition.name: run for run in runs}
    plain, full, local = done[PLAIN], done[FULL], done[LOCAL]
    found = []
    if full.generated != plain.generated:
        found.append("full attention generated other tokens than plain transformers")
    gap = full.score.token_accuracy.mean - local.score.token_accuracy.mean
    if gap < LEAST_GAP:
        found.append(f"full attention beats local by {gap:.2f} only, not {LEAST_GAP}")
    return found


def warnings(runs: list[Run]) -> list[str]:
    """What this run did not show and a busy machine may be the reason of."""
    done = {run.composition.name: run for run in runs}
    speed = speed_ratio(done[FULL], done[PLAIN])
    if speed >= LEAST_SPEED:
        return []
    return [
        f"full attention decoded at {speed:.2f}x plain transformers, not {LEAST_SPEED}x; on a "
        "machine with nothing else to do, run it again with more --rounds"
    ]


def main() -> int:
    args = parse_args()
    console, began = Console(), time.perf_counter()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    torch.set_num_threads(min(torch.get_num_threads(), args.threads))
    console.print("loading SmolLM2-135M-Instruct (the first time takes some seconds more)")
    model, tokenizer = load_smollm2(torch.float32)
    text = texts.python_topics()
    examples = tasks.needles(tokenizer, text, length=args.length, contexts=args.contexts, seed=SEED)
    rows = compositions()
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        bar = progress.add_task("", total=work_of(rows, examples, args.rounds))

        def finished(context: int, run: Run) -> None:
            accuracy = sum(a.token_accuracy for a in run.answers[-1]) / len(run.answers[-1])
            console.print(
                f"[dim]{time.perf_counter() - began:4.0f} s[/]  context {context + 1}  "
                f"{run.composition.name:<20} {accuracy:.2f} of the answers' tokens right"
            )

        runs = compare(
            model,
            rows,
            examples,
            rounds=args.rounds,
            round_tokens=ROUND_TOKENS,
            advance=lambda doing, work: progress.update(bar, description=doing, advance=work),
            finished=finished,
        )
    console.print(table(rows, runs))
    questions = sum(len(example.questions) for example in examples)
    console.print(
        f"{questions} questions about {len(examples)} documents of {args.length} tokens; standard "
        "errors are over documents. The question ends the prompt, so SnapKV has it in its "
        "observation window. MB are all that the first document's cache holds after its first "
        f"question and {ROUND_TOKENS * args.rounds} generated tokens; tokens read are per head.",
        style="dim",
    )
    gate = next((run for run in runs if run.composition.name == GATE), None)
    if gate is not None and gate.kept is not None:
        pipeline = gate.composition.pipeline
        kept_map.draw(
            args.picture,
            gate.kept,
            tokenizer,
            examples[0],
            title="What the write gate kept",
            window=pipeline.window if pipeline else 0,
        )
        console.print(f"what the gate kept, by token, layer and head: {args.picture}")
    by_name = {run.composition.name: run for run in runs}
    ratio = speed_ratio(by_name[FULL], by_name[PLAIN])
    console.print(
        f"full against plain transformers: {ratio:.2f}x the tokens/s, "
        f"{len(by_name[FULL].generated)} greedy tokens compared"
    )
    for warning in warnings(runs):
        console.print(f"[yellow]warning: {warning}[/]")
    problems = failures(runs)
    for problem in problems:
        console.print(f"[bold red]{problem}[/]")
    console.print(f"{time.perf_counter() - began:.0f} s")
    return 1 if problems else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, default=3, help="documents, 8 questions each")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a document")
    parser.add_argument("--rounds", type=int, default=4, help="timings of 8 tokens, in turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, default=Path("kvpolicy-demo.png"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
