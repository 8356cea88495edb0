"""One rank of test_parallel: generates on its share of the heads and saves what it saw.

A rank that waits for one that is gone is killed by the test, which then fails.
"""

from __future__ import annotations

import gc
import inspect
import sys
import warnings
from pathlib import Path

import attrs
import torch
from transformers import AutoModelForCausalLM

from kvpolicy import (
    TOVA,
    AcrossLayers,
    Adaptive,
    Admission,
    CachePipeline,
    CacheSpec,
    CriticalKV,
    ExpectedAttention,
    SnapKV,
    Tokens,
    TotalCap,
)
from kvpolicy.adapters.hf import attach, load_cache, spec_of
from kvpolicy.adapters.hf.compile import traced
from kvpolicy.adapters.hf.rule import probe as rule
from kvpolicy.adapters.hf.rule.records import ModelRefused
from kvpolicy.adapters.hf.training import attach_for_training
from kvpolicy.store import CacheState
from tests.support.adapters.models import SIZES, pipelines, prompt
from tests.support.adapters.rehearsed import Rehearsed, rehearsed
from tests.support.contract.cases import NAMES, Sizes, build
from tests.support.two_ranks import met

# What asks for queries before RoPE, frequencies and projections of this rank's heads.
ASKING = {
    "expected": ExpectedAttention(budget=14, when="decode"),
    "critical": CriticalKV(SnapKV(budget=14, observation=4)),
}
# What shares tokens between heads of different ranks, or looks across them.
SHARING = {
    "adaptive": SnapKV(budget=Adaptive(Tokens(14)), observation=4, when="decode"),
    "across layers": SnapKV(budget=AcrossLayers(Tokens(14)), observation=4, when="decode"),
    "total cap": SnapKV(budget=TotalCap(tokens=40), observation=4, when="decode"),
    "layer": TOVA(budget=14, across_heads=True),
}


# Policies that read attention inputs of other sizes than the model's, or want a replay; keys that
# are normalised have norms that rounding alone ranks.
LEFT_OUT = {"zap", "at_end_zap", "trim", "fast", "ranked", "judge", "kvzip", "knorm"}


def pairs():
    """Names of an admission, a selection and an eviction: each with several of the others."""
    admissions, selections, evictions = (
        [name for name in names if name not in LEFT_OUT] for names in NAMES
    )
    found = []
    for n, eviction in enumerate(evictions):
        for step in (0, 4, 7):
            admission = admissions[(n + step) % len(admissions)]
            found.append((admission, selections[(2 * n + step) % len(selections)], eviction))
    return found


def pipeline(name):
    if isinstance(name, tuple):
        spec = CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=16, **SIZES)
        return build(Sizes(spec, window=5), *name)
    if name in ASKING | SHARING:
        return CachePipeline(eviction=(ASKING | SHARING)[name], window=5)
    return pipelines()[name]


def generate(model, name, new=10):
    """Tokens, and the positions that each of this rank's heads kept."""
    options = {**prompt([33, 21]), "max_new_tokens": new, "do_sample": False}
    with attach(model, pipeline(name), **SIZES) as attachment:
        cache = attachment.new_cache()
        tokens = model.generate(**options, past_key_values=cache)
    heads = range(cache.spec.kv_heads)
    return tokens, [
        [[cache.state.kept(layer, row, head).tolist() for row in (0, 1)] for layer in (0, 1)]
        for head in heads
    ]


WAYS = {
    "sample": {"do_sample": True},
    "beam sample": {"do_sample": True, "num_beams": 2},
    "assisted sample": {"do_sample": True, "prompt_lookup_num_tokens": 3},
    "beams": {"num_beams": 2},
}


@attrs.frozen(kw_only=True)
class SecondHead(Admission):
    """Admits for head 1 alone, where it may fail at a layer."""

    fails_at: int | None = None
    window: int | None = None

    def admit(self, write):
        if self.fails_at == write.layer and 1 in write.heads:
            raise MemoryError(f"layer {write.layer}")
        heads = torch.tensor(list(write.heads), device=write.positions.device)[:, None] == 1
        return heads.expand(len(heads), len(write.positions))


def sampled(model, rank):
    """Tokens of each way to sample, from another seed on each rank."""
    found = {}
    for name, way in WAYS.items():
        torch.manual_seed(rank)
        with attach(model, pipelines()["gate"], **SIZES):
            ids = prompt([33])["input_ids"].to(model.device)
            found[name] = model.generate(ids, max_new_tokens=10, top_k=0, **way)
    return found


def told(call):
    """The kind of error that a call raises, and its sentence."""
    try:
        call()
    except BaseException as error:
        return type(error).__name__, str(error)
    return "none", ""


def holders(deep=9):
    """What holds the states of caches that nobody should hold any more, step by step upwards."""
    found, said = [x for x in gc.get_objects() if type(x) is CacheState], []
    seen, own = {id(x) for x in found}, {id(inspect.currentframe()), id(found)}
    for step in range(deep):
        above = []
        for x in found:
            above += [y for y in gc.get_referrers(x) if id(y) not in seen | own and y is not above]
            seen |= {id(y) for y in above}
        own.add(id(above))
        found = above
        said.append(f"{step}: " + ", ".join(_named(x) for x in found[:12]))
    return "\n".join(said)


def _named(x):
    frame = getattr(x, "f_code", None) and f" {x.f_code.co_qualname}:{x.f_lineno}"
    inside = f" {[str(k)[:20] for k in x][:6]}" if isinstance(x, dict | list | tuple) else ""
    return type(x).__name__ + (frame or inside or f" {getattr(x, '__qualname__', '')}")


def failures(model, rank, folder):
    """What each way to fail on rank 1 raises here, and whether the cache was left alone."""
    found, ids = {}, prompt([33])["input_ids"].to(model.device)
    tail = prompt([9], seed=2)["input_ids"].to(model.device)

    def trial(name, call, fails_at=None, **sizes):
        pipeline = CachePipeline(admission=SecondHead(), window=5)
        with attach(model, pipeline, **SIZES, **sizes) as attached:
            cache = attached.read(ids)
            before = cache.columns, cache.state.lengths, cache.report().kv
            if fails_at is not None:
                object.__setattr__(pipeline.admission, "fails_at", fails_at)
            gc.disable()  # what the call took is free as it ends
            raised = told(lambda: call(attached, cache))
            after = cache.columns, cache.state.lengths, cache.report().kv
            held = holders() if before != after else ""
            gc.enable()
            object.__setattr__(pipeline.admission, "fails_at", None)
            cache.begin_prompt()
            model(tail[:, :1], past_key_values=cache)  # the ranks are still in step
            if before != after:
                print(f"rank {rank}: {name}: {before} became {after}\n{held}", flush=True)
            found[name] = *raised, before == after

    def turn(attached, cache):
        attached.read(tail, cache=cache)

    def breaks(ids, scores):
        if rank == 1:
            raise ValueError("processor")
        return scores

    def processor(attached, cache):
        attached.ask(cache, tail, logits_processor=[breaks], max_new_tokens=5)

    def beams(attached, cache):
        attached.ask(cache, tail, logits_processor=[breaks], max_new_tokens=5, num_beams=2)

    def decode(attached, cache):
        attached.ask(cache, tail, max_new_tokens=40)

    def differ(attached, cache):
        model(tail[:, rank : rank + 1], past_key_values=cache)

    def early(attached, cache):
        if rank == 1:
            return model.generate(tail, max_new_tokens=3, num_beams=2)
        return model.generate(tail, max_new_tokens=4, num_beams=2)

    trial("layer", turn, fails_at=1)
    trial("prompt cap", turn, max_tokens=38)
    trial("decode cap", decode, max_tokens=50)
    trial("processor", processor)
    trial("processor of beams", beams)
    trial("other tokens", differ)
    trial("stops early", early)

    def save(attached, cache):
        cache.save(f"{folder}/{'none/' * rank}cache")

    trial("save", save)
    return found


def saved(model, rank, folder):
    """A cache that goes on from its files: tokens, equal reports, and what another file says."""
    with attach(model, pipeline("adaptive"), **SIZES) as attached:
        cache = attached.read(prompt([33, 21])["input_ids"].to(model.device))
        cache.save(f"{folder}/parts")
        other = load_cache(model, attached.pipeline, f"{folder}/parts", **SIZES)
        tail = prompt([9, 9], seed=2)["input_ids"].to(model.device)
        asked = [attached.ask(x, tail, max_new_tokens=5) for x in (cache, other)]
        reports = [x.report(all_ranks=True) for x in (cache, other)]
        error = told(lambda: load_cache(model, attached.pipeline, f"{folder}/whole", **SIZES))
        return torch.equal(*asked), asked[0], reports, cache.report(), error


def captured(model, rank):
    """What ranks agree on between captured steps, here rehearsed."""
    from tests.support.adapters import parallel_captured as steps

    with rehearsed():
        found = {"agreed": steps.agreed(model, rank), "recaptured": steps.recaptured(model, rank)}
        found["failures"] = steps.failures(model, rank)
        Rehearsed.fails = rank == 1
        found["one fails"] = steps.generated(model, "gate", 12)
    return found


def compiled(model):
    """Whether compiled layers give the tokens and logits that eager ones do."""
    options = {**prompt([33, 21]), "max_new_tokens": 6, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    outs = []
    with traced():
        for compile in (False, True):
            with attach(model, pipeline("gate"), compile=compile, **SIZES):
                outs.append(model.generate(**options))
    same = torch.equal(outs[0].sequences, outs[1].sequences)
    return same and all(
        torch.equal(a, b) for a, b in zip(outs[0].logits, outs[1].logits, strict=True)
    )


def probed_apart(model):
    """KV heads of a model that fails where it is probed, so that a cut one is instead."""

    def fails(own, verify):
        if own is model:
            raise ModelRefused("asked", check="forward")
        return whole(own, verify)

    whole, rule.probe_in_place = rule.probe_in_place, fails
    known, rule._KNOWN = rule._KNOWN, {}
    try:
        return spec_of(model).kv_heads
    finally:
        rule.probe_in_place, rule._KNOWN = whole, known


def trained(model):
    with attach_for_training(model):
        pass


def checked(folder, rank):
    """What this rank saw, by name."""
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
    names = ("striped", "gate", "gate-quest-snapkv", *ASKING, *SHARING, *pairs())
    found = {name: generate(model, name) for name in names}
    found["sampled"] = sampled(model, rank)
    found["failures"] = failures(model, rank, folder)
    found["saved"] = saved(model, rank, folder)
    found["captured"] = captured(model, rank)
    found["compiled"] = compiled(model)
    found["probed apart"] = probed_apart(model)
    found["trained"] = told(lambda: trained(model))
    return found


def main(folder, rank):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with met(f"{folder}/meet", rank):
        torch.save(checked(folder, rank), Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
