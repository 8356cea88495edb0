"""A likely mistake is refused by words that say what to write."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvpolicy
from kvpolicy import (
    CachePipeline,
    CacheSpec,
    DuoAttention,
    LocalAttention,
    Quest,
    SelectAll,
    SnapKV,
    Tokens,
    WriteGate,
    _elsewhere,
    testing,
)
from kvpolicy.adapters import hf
from kvpolicy.evaluation.models import tiny_llama

PIPELINE = CachePipeline(eviction=SnapKV(budget=40))
IDS = torch.randint(2, 500, (1, 50), generator=torch.Generator().manual_seed(0))
MODEL = tiny_llama()


def read(**given: Any) -> hf.KVPolicyCache:
    with hf.attach(MODEL, PIPELINE) as attached:
        return attached.read(**given)


def loglikelihood(**given: Any) -> torch.Tensor:
    with hf.attach(MODEL, PIPELINE) as attached:
        return attached.loglikelihood(**given)


def generated(ids: Any, past: hf.KVPolicyCache | None = None) -> None:
    with hf.attach(MODEL, PIPELINE):
        MODEL.generate(ids, past_key_values=past, max_new_tokens=2)


CLASSES = [
    (SnapKV, {"compression_ratio": 0.3}, r"write budget=Ratio\(0\.7\), the part that stays$"),
    (SnapKV, {"budget": 9, "window_size": 64}, "write observation=64$"),
    (SnapKV, {"budget": 9, "kernel_size": 7}, "write kernel=7$"),
    (SnapKV, {"max_capacity_prompt": 64}, "write budget=64$"),
    (Quest, {"token_budget": 64}, "write budget=64$"),
    (Quest, {"compression_ratio": 0.5}, "write budget=1024, the tokens that are read$"),
    (LocalAttention, {"n_sink": 4}, "write sinks=4$"),
    (LocalAttention, {"start_size": 4}, "write sinks=4$"),
    (LocalAttention, {"windows": 4}, "write window=4$"),
    (kvpolicy.Adaptive, {"base": 64, "alpha_safeguard": 0.2}, "write floor=0.2$"),
    (kvpolicy.Ratio, {"compression_ratio": 0.25}, "write 0.75, the part that stays$"),
    (kvpolicy.RandomGate, {"compression_ratio": 0.25}, "write sparsity=0.25$"),
    (DuoAttention, {"head_compression_ratio": 0.5}, r"write DuoAttention.from_pretrained\(path\)$"),
    (WriteGate, {}, r"norm_pre: wanted .*got none; write WriteGate.from_pretrained\(path\)$"),
    (SnapKV, {}, r"budget: wanted .*, got none; write SnapKV\(budget=\.\.\.\)$"),
    (Tokens, {}, r"tokens: wanted .*, got none; write Tokens\(tokens=\.\.\.\)$"),
    (CachePipeline, {"evict": SelectAll()}, "evict: wanted one of .*; write eviction=SelectAll"),
    (CachePipeline, {"press": 1}, "press: wanted one of admission, .*, got 'press'$"),
    (kvpolicy.AdmitAll, {"window": 1}, r"AdmitAll, got 'window'; write CachePipeline\("),
    (SnapKV, {"budget": 9, "window": 8}, r"write CachePipeline\(\.\.\., window=8\)$"),
    (Quest, {"budget": 9, "chunk_size": 8}, r"write attach\(\.\.\., page_size=8\)$"),
    (kvpolicy.H2O, {"heavy_ratio": 0.1}, r"write budget=Ratio\(0\.1\)$"),
    (CacheSpec, {"block_size": 4}, "write page_size=4$"),
]


@pytest.mark.parametrize(("make", "given", "message"), CLASSES)
def test_names_of_other_libraries_say_what_to_write(make, given, message) -> None:
    with pytest.raises(TypeError, match=message):
        make(**given)


POSITIONAL = [
    (SnapKV, (64,), r"got 1 positional argument; write SnapKV\(budget=64\)$"),
    (CachePipeline, (SnapKV(budget=9),), r"CachePipeline\(admission=\.\.\., selection=\.\.\., ev"),
    (Tokens, (1, 2), "Tokens: wanted at most 1 positional arguments, got 2 positional arguments$"),
    (kvpolicy.KeepAll, (1,), "KeepAll: wanted named arguments, got 1 positional argument$"),
]


@pytest.mark.parametrize(("make", "given", "message"), POSITIONAL)
def test_arguments_without_names(make, given, message) -> None:
    with pytest.raises(TypeError, match=message):
        make(*given)


HINTS = [
    (lambda: read(input_ids="a text"), r"write tokenizer\(text, return_tens"),
    (lambda: read(input_ids={"input_ids": IDS}), r"input_ids=inputs\['input"),
    (lambda: read(input_ids=[1, 2]), r"write torch.tensor\(\[ids\]\)"),
    (lambda: read(input_ids=IDS[0]), r"write input_ids\[None\]"),
    (
        lambda: PIPELINE.report(read(input_ids=IDS)),
        "state: wanted a CacheState, .*; write cache.state$",
    ),
    (lambda: PIPELINE.init(MODEL), r"spec: wanted a CacheSpec, .*spec_of\(model\)$"),
    (lambda: hf.new_cache(MODEL, PIPELINE, dtype="float16"), "dtype: .*; write torch.float16$"),
    (lambda: testing.check_eviction(Quest(budget=9)), r"write check_selection\(policy\)$"),
    (lambda: testing.check_eviction(SnapKV), r"got the class SnapKV; write SnapKV\(\.\.\.\)$"),
    (lambda: hf.attach(MODEL, PIPELINE, block_size=4), "block_size: .*; write page_size=4$"),
    (lambda: hf.attach(MODEL, PIPELINE, backend="triton"), r"write CachePipeline\(backend='triton"),
    (lambda: hf.attach(MODEL.config, PIPELINE), "model: wanted a model .*, got a LlamaConfig$"),
    (lambda: CachePipeline(eviction="snapkv"), r"got 'snapkv'; write SnapKV\(\.\.\.\)$"),
    (lambda: CachePipeline(eviction=[SnapKV(budget=9)]), r"; write eviction=SnapKV\(\.\.\.\)$"),
    (lambda: CachePipeline(admission=[LocalAttention(), LocalAttention()]), "write any_of"),
    (lambda: DuoAttention.from_pretrained("x"), "got None and None; write sparsity=0.5, the part"),
    (lambda: WriteGate.from_pretrained(DUO), r"; write DuoAttention.from_pretrained\('duo-"),
    (
        lambda: DuoAttention.from_pretrained(GATE, sparsity=0.5),
        r"; write WriteGate.from_pretrained",
    ),
    (lambda: generated("a text"), r"inputs: wanted .*; write tokenizer\(text, return_tens"),
    (lambda: generated([1, 2]), r"inputs: wanted .*; write torch.tensor\(\[ids\]\)"),
    (lambda: generated(IDS[0]), r"inputs: wanted .*; write inputs\[None\]"),
    (lambda: generated(IDS.float()), r"inputs: wanted token ids .*float32; write tokenizer\("),
    (lambda: generated(IDS[:, :0]), "input_ids: wanted a prompt of one column or more, got none$"),
    (
        lambda: read(input_ids=IDS[:, :0]),
        "input_ids: .* of one column or more",
    ),
    (
        lambda: loglikelihood(input_ids=IDS, continuation_ids=TWO),
        "continuation_ids: wanted a row for each of input_ids, 1, got 2$",
    ),
    (
        lambda: generated(IDS[:, :20], read(input_ids=IDS)),
        r"input_ids: wanted all turns.* 50 .*, got 20; write",
    ),
    (
        lambda: generated(IDS, read(input_ids=IDS)),
        r"input_ids: wanted all turns, more than the 50 .*, got 50;",
    ),
]
TWO = IDS.expand(2, -1)
GATE, DUO = "smollm2-135m-instruct-w64-keep25", "duo-smollm2-135m-instruct"


@pytest.mark.parametrize(("make", "message"), HINTS)
def test_a_likely_mistake_says_what_to_write(make, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_next_turn_goes_on_with_all_turns() -> None:
    with hf.attach(MODEL, PIPELINE) as attached:
        held = attached.read(IDS[:, :40])
        out = MODEL.generate(IDS, past_key_values=held, max_new_tokens=2)
    assert out.shape[1] == 52


ROOT_NAMES = [
    ("PyramidKV", ImportError, r"write SnapKV\(budget=Pyramid\("),
    ("AdaKVPress", ImportError, r"write SnapKV\(budget=Adaptive\("),
    ("SnapKVPress", ImportError, "SnapKVPress: not its name in kvpolicy; write SnapKV$"),
    ("Snapkv", ImportError, "; write SnapKV$"),
    ("ThinKPress", ImportError, "no policy of this name; docs/coming-from.md and docs/policies"),
    ("MInference", ImportError, r"write VerticalSlash\("),
    ("RocketKV", ImportError, r"write CachePipeline\(selection=TopChannels\("),
    ("DecodingPress", ImportError, r'write SnapKV\(budget=\.\.\., when="decode"\)$'),
    ("atach", AttributeError, "no attribute 'atach'; write attach$"),
    ("report", AttributeError, "no attribute 'report'; write Report$"),
]


@pytest.mark.parametrize(("name", "kind", "message"), ROOT_NAMES)
def test_names_that_the_root_does_not_have(name, kind, message) -> None:
    with pytest.raises(kind, match=message):
        getattr(kvpolicy, name)
    if kind is ImportError:
        with pytest.raises(ImportError, match=message):
            exec(f"from kvpolicy import {name}")


def test_what_to_write_instead_is_here() -> None:
    for says in _elsewhere.KNOWN.values():
        assert says.partition("(")[0].partition(".")[0] in kvpolicy.__all__


def test_what_the_hub_does_not_give_is_one_sentence(monkeypatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route\n" * 9)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for read in (
        lambda: WriteGate.from_pretrained("a/b", "c.pt"),
        lambda: DuoAttention.from_pretrained("a/b", sparsity=0.5),
    ):
        with pytest.raises(FileNotFoundError, match="a/b is here, and the hub gave none .*copy$"):
            read()
