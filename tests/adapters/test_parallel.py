"""Tensor parallelism: two ranks see their own heads and decide as one process does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kvpolicy import Adaptive, CachePipeline, Pyramid, SnapKV, Tokens, UnsupportedError
from kvpolicy.adapters.hf import attach, load_cache, spec_of
from kvpolicy.exchange import ALONE
from tests.support.adapters.models import SIZES, prompt, tiny
from tests.support.adapters.parallel import WAYS, generate, pipeline
from tests.support.adapters.parallel_captured import NAMES
from tests.support.two_ranks import ROOT, run_two


@pytest.mark.slow
def test_two_ranks(tmp_path, qwen3):
    qwen3.save_pretrained(tmp_path)
    with attach(qwen3, pipeline("adaptive"), **SIZES) as attached:
        attached.read(prompt([9])["input_ids"]).save(tmp_path / "whole")
    run_two("tests.support.adapters.parallel", tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    _sampling_agrees([part.pop("sampled") for part in parts])
    _all_end(*(part.pop("failures") for part in parts))
    _goes_on(qwen3, tmp_path, [part.pop("saved") for part in parts])
    assert all(part.pop("compiled") for part in parts)
    assert [part.pop("probed apart") for part in parts] == [1, 1]
    for part in parts:
        kind, said = part.pop("trained")
        assert kind == "UnsupportedError" and "tensor parallelism splits them" in said
    _captures_agree(qwen3, [part.pop("captured") for part in parts])
    for name in parts[0]:
        tokens, kept = generate(qwen3, name)
        assert all(torch.equal(part[name][0], tokens) for part in parts), name
        assert parts[0][name][1] + parts[1][name][1] == kept, name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", "-m", "tests.support.adapters.parallel_nccl"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True,
        timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all agreed") == 2


def _sampling_agrees(parts):
    for name in WAYS:
        assert torch.equal(*(part[name] for part in parts)), name


def _all_end(first, second):
    kinds = {
        "layer": ("KVPolicyError", "MemoryError"),
        "prompt cap": ("CapacityError", "CapacityError"),
        "decode cap": ("CapacityError", "CapacityError"),
        "processor": ("KVPolicyError", "ValueError"),
        "processor of beams": ("KVPolicyError", "ValueError"),
        "other tokens": ("UnsupportedError", "UnsupportedError"),
        "stops early": ("UnsupportedError", "UnsupportedError"),
        "save": ("KVPolicyError", "FileNotFoundError"),
    }
    found = {name: (first[name][0], second[name][0]) for name in first}
    assert found == kinds, (first, second)
    for name in kinds:
        assert first[name][2] and second[name][2], f"{name} changed the cache"
    assert "rank 1" in first["layer"][1] and "layer 1" in second["layer"][1]
    assert "rank 1" in first["prompt cap"][1] and "cap is 38" in second["prompt cap"][1]


def _goes_on(model, folder, parts):
    with attach(model, pipeline("adaptive"), **SIZES) as attached:
        cache = attached.read(prompt([33, 21])["input_ids"])
        asked = attached.ask(cache, prompt([9, 9], seed=2)["input_ids"], max_new_tokens=5)
        whole = cache.report()
        with pytest.raises(UnsupportedError, match="by 2 ranks"):
            load_cache(model, attached.pipeline, folder / "parts", **SIZES)
    for equal, tokens, reports, own, error in parts:
        assert equal and torch.equal(tokens, asked)
        assert reports[0].stored == whole.stored and reports[0].evicted == whole.evicted
        assert reports[0].ring == whole.ring and reports[1].stored == whole.stored
        assert own in reports[0].ranks and reports[0].kv == sum(x.kv for x in reports[0].ranks)
        assert error[0] == "UnsupportedError" and "one process" in error[1]


def _captures_agree(model, parts):
    for name in NAMES:
        (same, eager, *_), alone = parts[0]["agreed"][name], generate(model, name, 24)[0]
        assert same and eager == "eager: asked", name
        for part in parts:
            assert part["agreed"][name][:3] == (True, "eager: asked", "captured")
            assert torch.equal(part["agreed"][name][4], alone), name
    captures = [[part["agreed"][name][3] for name in NAMES] for part in parts]
    assert captures[0] == captures[1] and all(captures[0])
    assert torch.equal(*(part["agreed"]["sampled"] for part in parts))
    assert [part["recaptured"] for part in parts] == [("captured", 2)] * 2
    for name, (kind, said, again) in parts[0]["failures"].items():
        other = parts[1]["failures"][name]
        if name == "cap":
            assert (kind, other[0]) == ("CapacityError",) * 2
            continue
        who = int(name[-1])
        told = [(kind, said), other[:2]]
        assert told[who] == ("ValueError", "breaks"), name
        assert told[1 - who][0] == "KVPolicyError" and f"rank {who}" in told[1 - who][1], name
        assert again == other[2]
    reasons = [part["one fails"][2] for part in parts]
    assert "on another rank" in reasons[0] and reasons[1].endswith("no capture"), reasons
    assert torch.equal(*(part["one fails"][0] for part in parts))


@pytest.mark.slow
def test_a_rank_that_breaks_off_ends_the_other(tmp_path, qwen3):
    qwen3.save_pretrained(tmp_path)
    run_two("tests.support.adapters.parallel_broken", tmp_path, waits_for=(0,))
    first, second = (torch.load(tmp_path / f"broken {rank}.pt") for rank in (0, 1))
    kind, said = first.pop("stopped")
    assert kind == "KVPolicyError" and "a rank of the tensor-parallel model is gone" in said
    assert first.keys() == second.keys()
    for name, (kind, said, *_) in second.items():
        assert (kind, said) == ("MemoryError", "broke"), name
    (kind, said), _ = first.pop("own loop"), second.pop("own loop")
    assert kind != "none"
    for name, (kind, said, again, kept) in first.items():
        assert kind == "KVPolicyError" and said.startswith("rank 1 of"), name
        for refused in (again, second[name][2]):
            assert refused[0] == "KVPolicyError" and "start anew" in refused[1], name
        assert kept and second[name][3], name


@pytest.mark.slow
def test_a_failure_anywhere_ends_the_call_on_both_ranks(tmp_path, qwen3):
    """A rank that stayed in an exchange would wait ten minutes, and longer than this test does."""
    qwen3.save_pretrained(tmp_path)
    run_two("tests.support.adapters.parallel_everywhere", tmp_path)
    parts = [torch.load(tmp_path / f"everywhere {rank}.pt") for rank in (0, 1)]
    assert parts[0].keys() == parts[1].keys()
    for case in parts[0]:
        if not isinstance(case, str):
            _ends_alike(case, *(part[case] for part in parts), *parts[0][case[0]])
    places = {case[1:3] for case in parts[0]}
    for call, place in (
        ("read", "prefill_attention"), ("read", "budget"), ("ask", "paged_decode"),
        ("ask", "window_scores"), ("beams", "rows"), ("save", "file"), ("report", "report"),
        ("ask", "room of an exchange"), ("read", "key of a call"),
    ):  # fmt: skip
        assert (call, place) in places


# Nothing undoes these halfway: what they worked on is refused from then on.
UNDONE = ("commit", "move_kept")


def _ends_alike(case, first, second, wanted, longer):
    *_, place, _, who = case
    raised, goes_on, left, again, tokens = zip(first, second, strict=True)
    assert raised[who] == ("Fault", place), case
    kind, said = raised[1 - who]
    assert kind == "KVPolicyError" and f"rank {who}" in said, case
    assert all(goes_on), f"{case} changed what others hold"
    if place in UNDONE and case[1] == "read":
        assert "none" not in (again[0][0], again[1][0]), case
        return
    # As before; or the prompt is stored, and its end can be asked for again.
    (same, _), (also, columns) = left
    assert same == also and (same or columns == 42), case
    for found in tokens:
        assert torch.equal(found[0], wanted if same else longer), case


class Sharded(torch.nn.Module):
    """A weight that says, as a DTensor does, which rows this rank holds."""

    def __init__(self, placements, mesh):
        super().__init__()
        self.weight = type("Weight", (), {"placements": placements, "device_mesh": mesh})()


@pytest.mark.parametrize("rank", [0, 1])
def test_head_counts_come_from_the_weights(rank):
    class Mesh:
        def size(self, axis):
            return (1, 2)[axis]

        def get_local_rank(self, axis):
            return (0, rank)[axis]

    from torch.distributed.tensor import Replicate, Shard

    model = tiny()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, Sharded((Replicate(), Shard(0)), Mesh()))
    spec = spec_of(model)
    assert (spec.heads, spec.kv_heads, spec.head_offset) == (2, 1, rank)
    assert spec.model_kv_heads == 2
    budget = Pyramid(base=Adaptive(base=Tokens(tokens=14)))
    pipeline = CachePipeline(eviction=SnapKV(budget=budget, observation=4), window=5)
    with pytest.raises(UnsupportedError, match="between KV heads"):
        pipeline.check(spec)  # without a way to the other ranks
    pipeline.check(spec, ALONE)


def test_heads_that_ranks_cannot_share_are_refused_before_anything_runs():
    from torch.distributed.tensor import Replicate, Shard

    class Three:
        def size(self, axis=0):
            return 3

    def spread(model, **placements):
        for layer in model.model.layers:
            for name, own in placements.items():
                setattr(layer.self_attn, name, Sharded((own,), Three()))
        model.model.forward = None  # would fail
        return model

    every = dict.fromkeys(("q_proj", "k_proj", "v_proj"), Shard(0))
    with pytest.raises(UnsupportedError, match="3 ranks cannot share its 2 KV heads evenly"):
        attach(spread(tiny(), **every), CachePipeline())
    with pytest.raises(UnsupportedError, match="3 ranks cannot share its 4 query heads"):
        attach(spread(tiny(num_key_value_heads=3), **every), CachePipeline())
    whole = every | {"k_proj": Replicate(), "v_proj": Replicate()}
    with pytest.raises(
        UnsupportedError, match="3 ranks share the query heads while each holds all"
    ):
        model = tiny(hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
        attach(spread(model, **whole), CachePipeline())
