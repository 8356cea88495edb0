"""One long document, many questions: read once, fork the cache for each, then hold a talk.

    python examples/long_document.py           # SmolLM2-135M-Instruct, its gate, real text
    python examples/long_document.py --tiny    # a tiny random Llama on random tokens, seconds

Numbers are hidden in a document and asked for, so that answers are right or wrong. A fork shares
the document's full pages with the original and adds its own: the column "shared" counts pages that
two or more live caches hold, and the bytes of all together grow by a question, not by a document.
An eviction while decoding would rewrite pages, which then are shared no longer; evict when the
prompt ends, before forking.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvpolicy import CachePipeline, Quest, RandomGate, WriteGate
from kvpolicy.adapters.hf import KVPolicyCache, attach
from kvpolicy.evaluation.models import tiny_llama

GATE = "smollm2-135m-instruct-w64-keep25"
QUESTIONS = 3
PAGE = 4  # what a gate admits lies far apart, so that Quest's bounds of longer pages say little
SEED = 7


class Talk:
    """A document, questions about it, and text in and out.

    `questions` are ids `[1, N]` up to where the answer begins, `answers` the right ids `[N]`.
    """

    def __init__(self, tiny: bool, tokens: int) -> None:
        self.tokenizer: Any = None
        if tiny:
            self.model = tiny_llama()
            self.document = torch.randint(2, 500, (1, tokens))
            self.questions = [torch.randint(2, 500, (1, 24)) for _ in range(QUESTIONS)]
            self.answers = [torch.randint(2, 500, (8,)) for _ in range(QUESTIONS)]
            return
        from kvpolicy.evaluation import tasks, texts
        from kvpolicy.evaluation.models import load_smollm2

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model, self.tokenizer = load_smollm2(dtype, device)
        (example,) = tasks.needles(
            self.tokenizer, texts.python_topics(), length=tokens, contexts=1, count=QUESTIONS,
            digits=4, seed=SEED,
        )  # fmt: skip
        self.document = torch.tensor([example.context_ids], device=device)
        asked = example.questions
        self.questions = [torch.tensor([x.question_ids], device=device) for x in asked]
        self.answers = [torch.tensor(x.answer_ids, device=device) for x in asked]

    def turn(self, number: int) -> Tensor:
        """A question as the next message of a conversation, ids `[1, N]`."""
        question = self.questions[number]
        if self.tokenizer is None or number == 0:
            return question
        opening = self.tokenizer("<|im_end|>\n<|im_start|>user", add_special_tokens=False)
        return torch.cat([question.new_tensor([opening.input_ids]), question], 1)

    def length(self, number: int) -> dict[str, int]:
        """Arguments of `generate` for as many tokens as the right answer has."""
        size = len(self.answers[number])
        return {"max_new_tokens": size, "min_new_tokens": size}

    def answer(self, ids: Tensor, cache: KVPolicyCache, number: int) -> Tensor:
        """`ids` `[1, N]` with the answer; what the cache has seen of them is not computed again."""
        return self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            **self.length(number),
        )

    def verdict(self, out: Tensor, number: int) -> str:
        """Question, answer, and whether it is right."""
        wanted = self.answers[number]
        got = out[0, -len(wanted) :]
        if self.tokenizer is None:
            return f"question {number + 1}: {' '.join(map(str, got.tolist()))}"
        asked, said, right = map(self.tokenizer.decode, (self.questions[number][0], got, wanted))
        question = asked.strip().partition("?")[0]
        return f"[bold]{question}?[/bold] {said} ({'right' if said == right else f'not {right}'})"


def pipeline_for(tiny: bool, budget: int) -> CachePipeline:
    """A gate writes, Quest reads; what is in pages stays there."""
    gate: Any = RandomGate(sparsity=0.5) if tiny else WriteGate.from_pretrained(GATE)
    return CachePipeline(admission=gate, selection=Quest(budget=budget), window=64)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a random model on random tokens")
    parser.add_argument("--tokens", type=int, default=1000, help="length of the document")
    parser.add_argument("--budget", type=int, default=256, help="tokens that a head reads a step")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    talk = Talk(args.tiny, args.tokens)
    console = Console(width=120)
    table = Table(
        "step", title="tokens per KV head; bytes of the cache and its live forks together"
    )
    for name in ("columns", "admitted", "stored", "read", "K/V KiB", "shared pages"):
        table.add_column(name, justify="right")

    def record(step: str, cache: KVPolicyCache) -> None:
        report = cache.report()
        heads = sum(len(layer) for layer in report.stored)
        table.add_row(
            step,
            str(cache.columns),
            f"{report.mean_admitted:.0%}",
            f"{sum(map(sum, report.stored)) / heads:.0f}",
            f"{report.mean_read:.0f}",
            f"{report.kv / 1024:,.0f}",
            f"{report.shared_pages:,}",
        )

    with (
        attach(talk.model, pipeline_for(args.tiny, args.budget), page_size=PAGE) as attached,
        torch.no_grad(),
    ):
        cache = attached.read(talk.document)
        record("document", cache)

        forks = []  # all stay alive
        for number, question in enumerate(talk.questions):
            forks.append(cache.fork())
            out = talk.answer(torch.cat([talk.document, question], 1), forks[-1], number)
            console.print(talk.verdict(out, number))
            record(f"fork {number + 1}", forks[-1])
        forks.clear()
        record("without forks", cache)
        # `ask` forks and generates in one call: the cache stays as it was.
        out = attached.ask(cache, talk.questions[0], do_sample=False, **talk.length(0))
        console.print(talk.verdict(out, 0))
        record("asked aside", cache)

        ids = talk.document
        for number in range(QUESTIONS):
            ids = talk.answer(torch.cat([ids, talk.turn(number)], 1), cache, number)
            console.print(talk.verdict(ids, number))
            record(f"turn {number + 1}", cache)
    console.print(table)


if __name__ == "__main__":
    main()
