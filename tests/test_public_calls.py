"""Every argument of every public function, given every kind of nonsense: refused by its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

import kvpolicy
from kvpolicy import (
    CachePipeline,
    CacheSpec,
    CacheState,
    DuoAttention,
    LocalAttention,
    Quest,
    SnapKV,
    WriteGate,
    pretrained,
    store,
    testing,
)
from kvpolicy._fields import shown
from kvpolicy.adapters import hf
from kvpolicy.evaluation.models import tiny_llama
from kvpolicy.spec import LayerSizes
from tests.support.stage import tiny_gate, tiny_pattern

NONSENSE = [
    None, True, -1, 10**30, 0.5, float("nan"), "nonsense", "", b"x", [], ["a"], (), {"a": 1}, {1},
    object(), 1j, torch.ones(2), torch.ones(2, 3), torch.ones(2).long(), torch.int32, SnapKV,
    Quest(budget=9), lambda x: x, nn.Linear(2, 2),
]  # fmt: skip
SPEC = CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=8)
ONE = {"heads": 4, "kv_heads": 2, "head_dim": 8}
SHARED = attrs.evolve(SPEC, per_layer=(LayerSizes(**ONE, shared=True),) * 2)
PIPELINE = CachePipeline(eviction=SnapKV(budget=40))
IDS = torch.randint(2, 500, (1, 50), generator=torch.Generator().manual_seed(0))
MODEL = tiny_llama()


class Takes:
    """What an argument takes: values of `kinds` that `fits`, and None where `none` says so."""

    def __init__(self, *kinds: type, none: bool = False, fits: Callable = lambda value: True):
        self.kinds, self.none, self.fits = kinds, none, fits

    def __call__(self, value: Any) -> bool:
        if value is None:
            return self.none
        return type(value) in self.kinds and self.fits(value)


COUNT = Takes(int, fits=lambda x: 1 <= x < 1 << 30)
MAYBE_COUNT = Takes(int, none=True, fits=lambda x: 1 <= x < 1 << 30)
FLAG, MAYBE_FLAG = Takes(bool), Takes(bool, none=True)
PATH = Takes(str, fits=bool)
TEXT = Takes(str, none=True)
NOTHING, NONE = Takes(), Takes(none=True)
# Floats where they are right for a mask, and a wrong size: refused, or taken, by other words.
MASK = Takes(Tensor, none=True, fits=lambda x: x.ndim == 2)
EMBEDS = Takes(Tensor, none=True, fits=lambda x: x.ndim == 3)
FRACTION = Takes(int, float, none=True, fits=lambda x: 0 <= x <= 1)
SIZES = {"layers", "kv_heads", "head_dim", "hidden", "tokens", "group", "page_size", "window"}


class Call:
    """A function, how to call it well, and what each of its arguments takes."""

    def __init__(self, make: Callable[[Path], tuple[Callable, dict]], **takes: Takes) -> None:
        self.make, self.takes = make, takes


def state() -> CacheState:
    return PIPELINE.init(SPEC)


def opened(name: str) -> CacheState:
    found = PIPELINE.init(SHARED) if name == "shared" else state()
    PIPELINE.begin(found, [3], "prompt")
    if name != "attend":
        for layer in range(2):
            tensors = (torch.ones(heads, 3, 8) for heads in (4, 2, 2))
            PIPELINE.attend(found, layer, *tensors)
    return found


def cache(folder: Path | None = None) -> hf.KVPolicyCache:
    with hf.attach(MODEL, PIPELINE) as attached:
        return attached.read(IDS)


def saved(folder: Path) -> Path:
    cache().save(folder / "c.safetensors")
    return folder / "c.safetensors"


def saved_pipeline(folder: Path) -> Path:
    kvpolicy.save_pipeline(PIPELINE, folder / "p.json")
    return folder / "p.json"


def on(method: str, **base: Any) -> Callable[[Path], tuple[Callable, dict]]:
    """A method of a pipeline, with a state of its own where it takes one."""
    return lambda folder: (getattr(PIPELINE, method), base)


def of_cache(method: str, **base: Any) -> Callable[[Path], tuple[Callable, dict]]:
    return lambda folder: (lambda **given: getattr(cache(), method)(**given), base)


def attached(method: str, **base: Any) -> Callable[[Path], tuple[Callable, dict]]:
    """A method of an attachment that is made for the call."""

    def call(**given: Any) -> object:
        with hf.attach(MODEL, PIPELINE) as found:
            more = {"cache": found.read(IDS)} if method == "ask" and "cache" not in given else {}
            return getattr(found, method)(**given, **more)

    return lambda folder: (call, base)


def serving(**given: Any) -> None:
    with hf.attach(MODEL, PIPELINE):
        hf.generate_many(**given)


def attaching(**given: Any) -> None:
    hf.attach(**given).detach()


LOOKS_BACK = CachePipeline(eviction=kvpolicy.KVzip(budget=64), window=8)


class Letters:
    """A tokenizer."""

    def encode(self, text, add_special_tokens):
        return [ord(letter) % 50 for letter in text]


def looking_back(**given: Any) -> None:
    with hf.attach(MODEL, LOOKS_BACK) as found:
        if "cache" not in given:
            given["cache"] = found.new_cache()
            MODEL(IDS, past_key_values=given["cache"])
        found.replay(**given)


def read_in() -> CacheState:
    found = LOOKS_BACK.init(SPEC)
    LOOKS_BACK.begin(found, [3], "prompt")
    for layer in range(2):
        LOOKS_BACK.attend(found, layer, *(torch.ones(heads, 3, 8) for heads in (4, 2, 2)))
    LOOKS_BACK.commit(found)
    return found


def replaying(**given: Any) -> None:
    with LOOKS_BACK.replay(**given):
        pass


KIT = {
    "policy": NOTHING, "dtype": NOTHING, "takes_effect": MAYBE_FLAG,
    "seed": Takes(int, fits=lambda x: x >= 0),
    **dict.fromkeys(("layers", "kv_heads", "head_dim"), NOTHING),
}  # fmt: skip
CALLS = {
    "attach": Call(
        lambda folder: (attaching, {"model": MODEL, "pipeline": PIPELINE}),
        model=NOTHING, pipeline=NOTHING, compile=FLAG, warm=FLAG, verify=FLAG, dtype=NONE,
    ),
    "new_cache": Call(
        lambda folder: (hf.new_cache, {"model": MODEL, "pipeline": PIPELINE}),
        model=NOTHING, pipeline=NOTHING, dtype=NONE,
    ),
    "detach": Call(lambda folder: (hf.detach, {"model": MODEL}), model=NOTHING),
    "generate_many": Call(
        lambda folder: (serving, {"model": MODEL, "requests": []}),
        model=NOTHING, requests=Takes(list, tuple, fits=lambda x: not x), slots=COUNT,
        tokens_per_call=COUNT, max_bytes=NONE, tokenizer=NONE,
        shared_prefix=Takes(Tensor, none=True, fits=lambda x: x.ndim < 2 and x.dtype == torch.long),
    ),
    "spec_of": Call(
        lambda folder: (hf.spec_of, {"model": MODEL}), model=NOTHING, dtype=NONE, device=NONE
    ),
    "fit_report": Call(
        lambda folder: (hf.fit_report, {"config_or_model": MODEL, "tokens": 100}),
        config_or_model=Takes(LlamaConfig), tokens=COUNT, admitted=FRACTION, pipeline=NONE,
        batch=COUNT, dtype=NONE,
    ),
    "load_cache": Call(
        lambda folder: (
            hf.load_cache,
            {"model": MODEL, "pipeline": PIPELINE, "path": saved(folder)},
        ),
        model=NOTHING, pipeline=NOTHING, path=PATH, dtype=NONE,
    ),
    "WriteGate.from_pretrained": Call(
        lambda folder: (
            WriteGate.from_pretrained,
            {"path_or_repo": tiny_gate(folder / "g.safetensors")},
        ),
        path_or_repo=PATH, file=TEXT, threshold=FRACTION, window=MAYBE_COUNT,
        activation=Takes(none=True), revision=TEXT,
    ),
    "DuoAttention.from_pretrained": Call(
        lambda folder: (
            DuoAttention.from_pretrained,
            {"path_or_repo": tiny_pattern(folder / "duo"), "sparsity": 0.5},
        ),
        path_or_repo=PATH, sparsity=FRACTION, threshold=FRACTION, sinks=MAYBE_COUNT,
        window=MAYBE_COUNT, seed=COUNT, revision=TEXT,
    ),
    "pretrained.path": Call(
        lambda folder: (pretrained.path, {"name": "duo-smollm2-135m-instruct"}),
        name=Takes(str), folder=Takes(str, none=True, fits=bool),
    ),
    "read": Call(
        attached("read", input_ids=IDS),
        input_ids=NOTHING, attention_mask=MASK, inputs_embeds=EMBEDS, cache=NONE,
        chunk_size=MAYBE_COUNT,
    ),
    "ask": Call(
        attached("ask", input_ids=IDS[:, :4], max_new_tokens=2),
        cache=NOTHING, input_ids=NOTHING, attention_mask=MASK, question=NOTHING,
    ),
    "attached.replay": Call(
        lambda folder: (looking_back, {"input_ids": IDS[:, :4]}),
        cache=NOTHING, input_ids=NOTHING, inputs_embeds=NONE, attention_mask=MASK, span=NONE,
        sinks=Takes(int, fits=lambda x: x >= 0),
    ),
    "repeats": Call(
        lambda folder: (hf.repeats, {"tokenizer": Letters(), "input_ids": IDS[:1]}),
        tokenizer=NOTHING, input_ids=NOTHING, chunk_size=COUNT, suffix=Takes(str),
        prefix=Takes(int, fits=lambda x: 0 <= x < IDS.shape[1]),
        previous=Takes(int, fits=lambda x: 0 <= x < 1 << 30),
    ),
    "loglikelihood": Call(
        attached("loglikelihood", input_ids=IDS, continuation_ids=IDS[:, :3]),
        input_ids=NOTHING, continuation_ids=NOTHING, attention_mask=MASK, question=NOTHING,
        continuation_mask=MASK,
    ),
    "cache.fork": Call(of_cache("fork"), rows=NONE),
    "cache.crop": Call(of_cache("crop", tokens=0), tokens=Takes(int, fits=lambda x: abs(x) < 1e9)),
    "cache.save": Call(
        lambda folder: (lambda **given: cache().save(**given), {"path": folder / "d"}), path=PATH
    ),
    "cache.begin_prompt": Call(of_cache("begin_prompt"), boundary=MAYBE_COUNT),
    "init": Call(on("init", spec=SPEC), spec=NOTHING, batch=COUNT, exchange=NONE),
    "dry": Call(on("dry", spec=SPEC), spec=NOTHING, batch=COUNT),
    "check": Call(on("check", spec=SPEC), spec=NOTHING, exchange=NONE),
    "begin": Call(
        lambda folder: (PIPELINE.begin, {"state": state(), "lengths": [3], "phase": "prompt"}),
        state=NOTHING, lengths=NOTHING, phase=NOTHING, valid=NONE,
    ),
    "attend": Call(
        lambda folder: (
            PIPELINE.attend,
            {"state": opened("attend"), "layer": 0, "query": torch.ones(4, 3, 8)}
            | {name: torch.ones(2, 3, 8) for name in ("key", "value")},
        ),
        state=NOTHING, layer=Takes(int, bool, fits=lambda x: x in (0, 1)), query=NOTHING,
        key=NOTHING, value=NOTHING,
    ),
    "commit": Call(
        lambda folder: (PIPELINE.commit, {"state": opened("commit")}), state=NOTHING, evict=FLAG
    ),
    "reserve": Call(
        lambda folder: (PIPELINE.reserve, {"state": state(), "steps": 1}),
        state=NOTHING, steps=COUNT,
    ),
    "replay": Call(
        lambda folder: (replaying, {"state": read_in()}),
        state=NOTHING, span=NONE, sinks=Takes(int, fits=lambda x: x >= 0),
    ),
    **{
        name: Call(on(name, state=None), state=NOTHING)
        for name in ("abort", "end_prompt", "maintain", "report", "due")
    },
    "tell": Call(
        lambda folder: (PIPELINE.tell, {"state": state(), "layer": 0}),
        state=NOTHING, layer=Takes(int, bool, fits=lambda x: x in (0, 1)),
    ),
    "attend_shared": Call(
        lambda folder: (
            PIPELINE.attend_shared,
            {"state": opened("shared"), "layer": 0, "query": torch.ones(4, 3, 8)},
        ),
        state=NOTHING, layer=Takes(int, bool, fits=lambda x: x in (0, 1)), query=NOTHING,
        last=NONE,
    ),
    "load_pipeline": Call(
        lambda folder: (kvpolicy.load_pipeline, {"path": saved_pipeline(folder)}),
        path=NOTHING, trust_code=FLAG,
    ),
    "save_pipeline": Call(
        lambda folder: (kvpolicy.save_pipeline, {"pipeline": PIPELINE, "path": folder / "p.json"}),
        pipeline=NOTHING, path=NOTHING,
    ),
    "kept": Call(
        lambda folder: (state().kept, {"layer": 0, "row": 0, "head": 0}),
        layer=NOTHING, row=NOTHING, head=NOTHING,
    ),
    "finish": Call(lambda folder: (state().finish, {"rows": [0]}), rows=Takes(list, tuple)),
    "resume": Call(
        lambda folder: (state().resume, {"rows": [0]}), rows=Takes(list, tuple, none=True)
    ),
    "store.side_state": Call(
        lambda folder: (store.side_state, {"state": state()}), state=NOTHING, batch=COUNT
    ),
    "store.move": Call(
        lambda folder: (
            store.move,
            {"target": (found := PIPELINE.init(SPEC, 2)), "slot": 0, "source": found, "row": 1},
        ),
        target=NOTHING, slot=NOTHING, source=NOTHING, row=NOTHING,
    ),
    "store.clear": Call(
        lambda folder: (store.clear, {"state": state(), "rows": [0]}),
        state=NOTHING, rows=Takes(list, tuple),
    ),
    "store.park": Call(
        lambda folder: (store.park, {"state": state(), "row": 0}), state=NOTHING, row=NOTHING
    ),
    "store.unpark": Call(
        lambda folder: (
            store.unpark,
            {"state": (found := state()), "slot": 0, "parked": store.park(found, 0)},
        ),
        state=NOTHING, slot=NOTHING, parked=NOTHING,
    ),
    "store.free_pages": Call(lambda folder: (store.free_pages, {}), state=NOTHING),
    "store.held_pages": Call(lambda folder: (store.held_pages, {}), state=NOTHING),
    "store.step_pages": Call(
        lambda folder: (store.step_pages, {"state": state(), "steps": 1}),
        state=NOTHING, steps=COUNT,
    ),
    "store.prompt_pages": Call(
        lambda folder: (store.prompt_pages, {"state": state(), "added": [1]}),
        state=NOTHING, added=NOTHING,
    ),
    "check_admission": Call(
        lambda folder: (testing.check_admission, {"policy": LocalAttention(window=4)}),
        **KIT, hidden=NOTHING, tokens=NOTHING,
    ),
    "check_selection": Call(
        lambda folder: (testing.check_selection, {"policy": Quest(budget=16)}),
        **KIT | {"policy": Takes(Quest)}, group=NOTHING, page_size=NOTHING, window=NOTHING,
        upper_bound=FLAG,
    ),
    "check_eviction": Call(
        lambda folder: (testing.check_eviction, {"policy": SnapKV(budget=16, observation=4)}),
        **KIT, group=NOTHING, hidden=NOTHING, window=NONE, tokens=NONE, page_size=NOTHING,
    ),
    "per_layer": Call(
        lambda folder: (kvpolicy.per_layer, {"default": Quest(budget=9), "layers": {}}),
        default=Takes(Quest), layers=Takes(list, tuple, dict, set, fits=lambda x: not x),
    ),
}  # fmt: skip


def functions() -> dict[str, Callable]:
    """Public functions, and public methods of what they give."""
    rooms = (kvpolicy, hf, testing, pretrained)
    found = {
        f"{'pretrained.' if room is pretrained else ''}{name}": value
        for room in rooms
        for name in (room.__all__ if room is kvpolicy else vars(room))
        if inspect.isfunction(value := getattr(room, name)) and not name.startswith("_")
        and value.__module__.startswith("kvpolicy")
        and not value.__module__.startswith("kvpolicy._")
    }  # fmt: skip
    found |= {n: getattr(CacheState, n) for n in ("kept", "finish", "resume")}
    found |= {
        f"store.{name}": value for name, value in vars(store).items()
        if inspect.isfunction(value) and name not in ("save", "load")
    }  # fmt: skip
    found |= {n: getattr(hf.Attachment, n) for n in ("read", "ask", "loglikelihood")}
    found["attached.replay"] = hf.Attachment.replay
    found |= {
        f"cache.{n}": getattr(hf.KVPolicyCache, n) for n in ("fork", "crop", "save", "begin_prompt")
    }
    methods = vars(CachePipeline)
    found |= {n: f for n, f in methods.items() if inspect.isfunction(f) and not n.startswith("_")}
    for kind in (WriteGate, DuoAttention):
        found[f"{kind.__name__}.from_pretrained"] = kind.from_pretrained
    return found


# Held elsewhere: tuples of policies, names without arguments, and a captured loop's own calls.
LEFT = {
    "any_of": "tests/policies/test_arguments.py",
    "all_of": "tests/policies/test_arguments.py",
    "pretrained.names": "it takes nothing",
    "activate": "of captured loops",
    "prepare_replay": "of captured loops",
    "replayed": "of captured loops",
}
# Tensors of the model that only some policies want.
LEFT_ARGUMENTS = {("attend", name) for name in ("key_pre", "hidden", "query_pre", "sinks")}
LEFT_ARGUMENTS |= {("attend_shared", "sinks")}


def test_every_public_function_and_argument_stands_here() -> None:
    found = functions()
    assert set(found) - set(LEFT) == set(CALLS)
    for name, call in CALLS.items():
        named = [
            x.name
            for x in inspect.signature(found[name]).parameters.values()
            if x.kind is not x.VAR_KEYWORD and x.name not in ("self", "cls")
        ]
        left = {argument for of, argument in LEFT_ARGUMENTS if of == name}
        assert set(named) - left == set(call.takes), name


CASES = [(name, argument) for name, call in CALLS.items() for argument in call.takes]


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_a_wrong_argument_is_named(name: str, argument: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    function, base = CALLS[name].make(tmp_path)
    wrong = []
    for value in NONSENSE:
        if CALLS[name].takes[argument](value):
            continue
        try:
            function(**base | {argument: value})
        except (TypeError, ValueError, kvpolicy.UnsupportedError) as error:
            says = re.match(rf"(\w+, )*{argument}(, \w+)*: (wanted|.*is a file)", str(error))
            if not says or ", got " not in str(error) or len(str(error)) > 1200:
                wrong.append((shown(value), type(error).__name__, str(error)[:200]))
        except Exception as error:
            wrong.append((shown(value), type(error).__name__, str(error)[:200]))
        else:
            wrong.append((shown(value), "was taken"))
    assert not wrong
