"""Calls that each command's help shows; docs/command-line.md runs them."""

from __future__ import annotations

import re

WIDTH = 74
GATE = "smollm2-135m-instruct-w64-keep25"
DUO = "duo-smollm2-135m-instruct"

# By command: what a call does, and the call.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "generate": (
        (
            "answer through a cache that a gate keeps small",
            f'kvpolicy generate smollm2 "What is a cache?" --gate {GATE} --max-new-tokens 40',
        ),
        (
            "ask about a file; of its tokens each head keeps 300",
            'kvpolicy generate smollm2 "What is this about?" --file notes.txt --snapkv 300 '
            "--max-new-tokens 40",
        ),
        (
            "continue a text from stdin, the answer alone in a file",
            "kvpolicy generate smollm2 - --raw --no-report --max-new-tokens 20 < notes.txt "
            "> more.txt",
        ),
    ),
    "chat": (
        (
            "talk; half of the heads stream, and a generated token reads 512",
            f"kvpolicy chat smollm2 --duo {DUO} --quest 512 --max-new-tokens 60",
        ),
    ),
    "plan": (
        ("what a cache takes without policies", "kvpolicy plan smollm2 --tokens 32000"),
        (
            "with a gate, for several fractions that it may admit",
            f"kvpolicy plan smollm2 --tokens 32000 --gate {GATE}",
        ),
        (
            "for one fraction, as JSON",
            f"kvpolicy plan smollm2 --tokens 32000 --gate {GATE} --admitted 0.25 --json",
        ),
    ),
    "inspect": (
        (
            "what a gate keeps of a text, and what that changes",
            f"kvpolicy inspect smollm2 --texts manual.txt --out kept --gate {GATE} --length 512",
        ),
    ),
    "calibrate": (
        (
            "the gate's threshold at which a fifth of the tokens is held",
            f"kvpolicy calibrate smollm2 --texts manual.txt --gate {GATE} --target 20% "
            "--length 1024 --prompts 1",
        ),
    ),
    "pareto": (
        (
            "two thresholds x two budgets, and which are worth their bytes",
            f"kvpolicy pareto smollm2 --texts manual.txt --out front --gate {GATE} --threshold 0.1 "
            '--threshold 0.4 --budget 0.25 --task "one needle" --length 512 --contexts 1',
        ),
    ),
    "evaluate": (
        (
            "accuracy of the shipped gates beside full attention, at most a minute",
            'kvpolicy evaluate smollm2 --out results --task "one needle" --length 512 '
            "--contexts 1 --variant full --variant gate --minutes 1",
        ),
        (
            "RULER's needles in 1024 tokens",
            "kvpolicy evaluate smollm2 --benchmark ruler --task niah_single_1 --length 1024 "
            "--contexts 1 --variant full --out ruler --minutes 1",
        ),
    ),
    "train-gate": (
        (
            "a gate that keeps a quarter of the cache (here for too few steps)",
            "kvpolicy train-gate smollm2 --texts manual.txt --out gate.safetensors "
            "--target-keep 0.25 --steps 4 --length 512 --batch-size 1",
        ),
    ),
    "train-duo": (
        (
            "which heads need the whole context (here for too few steps)",
            "kvpolicy train-duo smollm2 --texts manual.txt --out pattern --steps 2 --length 1024",
        ),
    ),
    "ablate": (
        (
            "which keys a gate should read, on a tiny model to see what it writes",
            "kvpolicy ablate inputs --quick --out ablations",
        ),
    ),
    "reproduce": (
        (
            "figure 7 of WG-KV on a tiny model, to see what it writes",
            "kvpolicy reproduce wg-kv fig7 --quick --out again",
        ),
    ),
    "fit-q-filters": (
        (
            "the filters of Q-Filters, from two texts (here too few)",
            "kvpolicy fit-q-filters smollm2 --texts manual.txt --out filters.safetensors "
            "--length 512 --documents 2",
        ),
    ),
    "fit-triattention": (
        (
            "the statistics of TriAttention, from two texts (here too few)",
            "kvpolicy fit-triattention smollm2 --texts manual.txt --out statistics.safetensors "
            "--length 512 --documents 2",
        ),
    ),
    "fit-kvzap": (
        (
            "KVzap's linear form, from two texts (here too few)",
            "kvpolicy fit-kvzap smollm2 --texts manual.txt --out kvzap.safetensors --length 512 "
            "--documents 2",
        ),
    ),
    "models": (("whether two types are served", "kvpolicy models llama falcon --check"),),
    "bench": (("tiny shapes, also without a GPU", "kvpolicy bench --quick decode --out numbers"),),
    "warm": (
        (
            "kernels of a gate's prompts and of 8 sequences that decode",
            f"kvpolicy warm smollm2 --gate {GATE} --batch 8 --length 2048",
        ),
    ),
    "completion": (("in this shell; in ~/.bashrc for all", 'eval "$(kvpolicy completion bash)"'),),
}
# Of `kvpolicy --help`.
FIRST = ("generate", "plan", "evaluate")


def epilog(command: str) -> str:
    """Examples as a help page ends with them; "" is that of all commands."""
    chosen = EXAMPLES[command] if command else [EXAMPLES[name][0] for name in FIRST]
    lines = ["Example:" if len(chosen) == 1 else "Examples:"]
    for said, call in chosen:
        lines += ["", f"# {said}", *wrapped(call)]
    return "\n".join(lines)


def wrapped(call: str) -> list[str]:
    """A call in lines of a help page, as a shell reads them."""
    lines = [""]
    for part in re.split(r" (?=--|> |< )", call):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] = f"{lines[-1]} {part}".strip() if len(lines) == 1 else f"{lines[-1]} {part}"
    return lines
