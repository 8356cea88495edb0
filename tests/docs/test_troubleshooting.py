"""The page that goes by messages quotes messages: each is raised here and compared."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, BertConfig, BertModel, DynamicCache
from typer.testing import CliRunner

import kvpolicy
from kvpolicy import (
    CachePipeline,
    DuoAttention,
    LocalAttention,
    Quest,
    SnapKV,
    WriteGate,
    any_of,
    attach,
    new_cache,
)
from kvpolicy.adapters.hf import fit_report, versions
from kvpolicy.cli import app
from kvpolicy.evaluation.models import tiny_llama
from tests.support.docs import ROOT
from tests.support.stage import tiny_gate, tiny_tokenizer

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
IDS = torch.randint(2, 500, (1, 60), generator=torch.Generator().manual_seed(0))
SMALL = CachePipeline(eviction=SnapKV(budget=40), window=32)
LOCAL = LocalAttention(window=8)


def quoted() -> Iterator[str]:
    """The messages of the page's tables."""
    for line in PAGE.splitlines():
        row = re.fullmatch(r"\| `(.*)` \| .* \|", line)
        if row:
            yield row[1]


def generating(**options: object) -> None:
    with attach(tiny_llama(), SMALL) as attached:
        attached.model.generate(input_ids=IDS, max_new_tokens=2, **options)


def other_cache() -> None:
    other = CachePipeline(window=8)
    model = tiny_llama()
    with attach(model, SMALL):
        model.generate(input_ids=IDS, max_new_tokens=2, past_key_values=new_cache(model, other))


def cache(pipeline: CachePipeline, **sizes: object):
    with attach(tiny_llama(), pipeline, **sizes) as attached:
        return attached.read(IDS)


def detached() -> None:
    model = tiny_llama()
    with attach(model, SMALL) as attached:
        held = attached.new_cache()
    model(input_ids=IDS, past_key_values=held)


def another_decoder() -> None:
    model = tiny_llama()
    with attach(model, SMALL):
        model.model = tiny_llama().model
        model(input_ids=IDS)


def twice() -> None:
    model = tiny_llama()
    with attach(model, SMALL):
        attach(model, SMALL)


def of_its_own_attention() -> None:
    model = tiny_llama()
    AttentionInterface.register("own", lambda *args, **kwargs: None)
    try:
        model.config._attn_implementation = "own"
        attach(model, SMALL)
    finally:
        del AttentionInterface._global_mapping["own"]


def again() -> None:
    with attach(tiny_llama(), SMALL) as attached:
        held = attached.read(IDS)
        attached.model.generate(IDS[:, :20], past_key_values=held, max_new_tokens=2)


def around(call: Callable[[torch.nn.Module], object]) -> None:
    with attach(tiny_llama(), SMALL) as attached:
        call(attached.model)


def nested(model: torch.nn.Module, module: torch.nn.Module) -> None:
    hooks: list[torch.utils.hooks.RemovableHandle] = []

    def hook(*args: object) -> None:
        hooks.pop().remove()
        model(IDS[:, :5])

    hooks.append(module.register_forward_hook(hook))
    model.generate(IDS, max_new_tokens=2)


def asked_early() -> None:
    with attach(tiny_llama(), SMALL) as attached:
        attached.ask(attached.new_cache(), IDS)


def damaged(folder: Path) -> None:
    (folder / "gate.pt").write_bytes(b"no pickle")
    WriteGate.from_pretrained(folder / "gate.pt")


def of_other_size(folder: Path) -> None:
    gate = WriteGate.from_pretrained(tiny_gate(folder / "gate.safetensors"))
    attach(tiny_llama(layers=3), CachePipeline(admission=gate))


def without_a_fraction(folder: Path) -> None:
    gate = WriteGate.from_pretrained(tiny_gate(folder / "gate.safetensors"))
    fit_report(tiny_llama(), 100, pipeline=CachePipeline(admission=gate))


def command(*words: object) -> None:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 2, done.output
    raise ValueError(done.stderr.splitlines()[-1].removeprefix("error: "))


def chatting(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tiny_llama().save_pretrained(folder / "bare")
    tokenizer.save_pretrained(folder / "bare")
    command("chat", folder / "bare", "--device", "cpu")


def training(folder: Path) -> None:
    command("train-gate", "x", "--dataset", "a/b", "--out", folder / "g.pt", "--lam", 1)


def encoding() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 100}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    attach(BertModel(config).eval(), SMALL)


def asking_many(requests: object) -> None:
    with attach(tiny_llama(), SMALL) as attached:
        attached.generate_many(requests)


def saying(folder: Path) -> None:
    with attach(tiny_llama(), SMALL) as attached:
        attached.read("a text")


def broken(*args: object, **options: object) -> None:
    raise OSError("no network")


# By how the quoted message begins.
RAISES: dict[str, Callable[[Path], object]] = {
    "AdaKV: ": lambda folder: kvpolicy.AdaKV,
    "transformers: wanted": lambda folder: versions.check("6.0"),
    "budget: wanted": lambda folder: SnapKV(budget=0.5),
    "compression_ratio: ": lambda folder: SnapKV(compression_ratio=0.3),
    "SnapKV: wanted named": lambda folder: SnapKV(64),
    "eviction: wanted": lambda folder: CachePipeline(eviction=LOCAL),
    "selection: wanted": lambda folder: CachePipeline(selection=Quest),
    "pipeline: wanted": lambda folder: attach(tiny_llama(), SnapKV(budget=64)),
    "window: the parts": lambda folder: CachePipeline(admission=LOCAL, window=9),
    "SnapKV.budget: ": lambda folder: CachePipeline(eviction=SnapKV(budget=64), window=256),
    "WriteGate: made for": of_other_size,
    "policies: wanted": lambda folder: any_of([LOCAL]),
    "model: wanted a model": lambda folder: attach("gpt2", SMALL),
    "model: check 'attention'": lambda folder: encoding(),
    "requests: ": lambda folder: asking_many("hello"),
    "block_size: ": lambda folder: attach(tiny_llama(), SMALL, block_size=4),
    "attach: the model has": lambda folder: twice(),
    "past_key_values: the model is": lambda folder: detached(),
    "layers: the decoder": lambda folder: another_decoder(),
    "cache_implementation: ": lambda folder: generating(cache_implementation="static"),
    "use_cache=False: ": lambda folder: generating(use_cache=False),
    "attn_implementation: ": lambda folder: of_its_own_attention(),
    "output_attentions: ": lambda folder: generating(
        output_attentions=True, return_dict_in_generate=True
    ),
    "past_key_values: wanted": lambda folder: generating(past_key_values=DynamicCache()),
    "past_key_values: the cache belongs": lambda folder: other_cache(),
    "input_ids: wanted token": saying,
    "input_ids: wanted all": lambda folder: again(),
    "ask: the cache's": lambda folder: asked_early(),
    "report: nothing": lambda folder: new_cache(tiny_llama(), SMALL).report(),
    "last_report: ": lambda folder: attach(tiny_llama(), SMALL).last_report(),
    "attention without": lambda folder: around(lambda model: model.model.forward(IDS)),
    "another forward": lambda folder: around(lambda model: nested(model, model.model.norm)),
    "attention outside": lambda folder: around(
        lambda model: nested(model, model.model.embed_tokens)
    ),
    "trace: ": lambda folder: around(lambda model: torch.export.export(model, (IDS,))),
    "copy: an attached": lambda folder: copy.deepcopy(attach(tiny_llama(), SMALL).model),
    "max_tokens: a head": lambda folder: cache(CachePipeline(window=8), max_tokens=20),
    "crop: the cache has": lambda folder: cache(SMALL).crop(-100),
    "sequence 0: ... tokens are": lambda folder: cache(CachePipeline(window=8), rollback=4).crop(
        -9
    ),
    "sequence 0: an eviction": lambda folder: cache(SMALL).crop(-3),
    "backend='triton' on": lambda folder: cache(CachePipeline(backend="triton")),
    "path_or_repo: no file c.pt": lambda folder: WriteGate.from_pretrained("a/b", "c.pt"),
    "path_or_repo: no file ...": lambda folder: WriteGate.from_pretrained(folder / "none.pt"),
    "...: not a readable": damaged,
    "sparsity, threshold: ": lambda folder: DuoAttention.from_pretrained(folder),
    "gate: wanted": lambda folder: command("plan", "smollm2", "--gate", "keep25"),
    "device: wanted": lambda folder: command("generate", "smollm2", "hello", "--device", "cuda"),
    "model: there is no": lambda folder: command("plan", "/no/such"),
    "the package datasets": training,
    "admitted: wanted": without_a_fraction,
    "model: wanted a tokenizer": chatting,
}


@pytest.mark.parametrize("message", list(quoted()))
def test_a_quoted_message_is_what_is_said(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (make,) = (call for begin, call in RAISES.items() if message.startswith(begin))
    with pytest.raises(Exception) as caught:  # noqa: PT011  (of every kind that the page quotes)
        make(tmp_path)
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert re.fullmatch(pattern, str(caught.value), re.DOTALL), str(caught.value)


def test_every_case_is_quoted() -> None:
    messages = list(quoted())
    for begin in RAISES:
        assert sum(message.startswith(begin) for message in messages) == 1, begin
