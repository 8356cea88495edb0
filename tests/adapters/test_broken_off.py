"""attach and detach broken off at every line: the model is as it was, or a detach makes it so."""

from __future__ import annotations

import copy
import sys

import pytest
import transformers

from kvpolicy import CachePipeline
from kvpolicy.adapters.hf import attach, detach
from tests.support.adapters.faults import Fault, snapshot
from tests.support.adapters.models import gate, pipelines, prompt, tiny

FILES = tuple(f"adapters/hf/{name}.py" for name in ("attach", "changes", "compile", "config_names"))


class Break:
    """Raises Fault at the `nth` line of the adapter's own code; counts all lines without one."""

    def __init__(self, nth=None):
        self.nth, self.count = nth, 0

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.nth:
                sys.settrace(None)
                raise Fault
        return self.trace


def lines_of(work):
    with Break() as lines:
        found = work()
    return lines.count, found


@pytest.mark.parametrize("compile", [False, True])
def test_attach(compile):
    model = tiny(layers=1)
    pipeline = CachePipeline(admission=gate(layers=1))
    attach(model, pipeline, compile=compile).detach()  # what is made once is made
    before = snapshot(model)
    count, attached = lines_of(lambda: attach(model, pipeline, compile=compile))
    attached.detach()
    assert count > 60
    for nth in range(1, count + 1):
        with Break(nth), pytest.raises(Fault):
            attach(model, pipeline, compile=compile)
        assert snapshot(model) == before, nth
    with attach(model, pipeline):
        pass


@pytest.mark.parametrize("compile", [False, True])
def test_detach(compile):
    model = tiny(layers=1)
    pipeline = CachePipeline(admission=gate(layers=1))
    before = snapshot(model)
    count, _ = lines_of(attach(model, pipeline, compile=compile).detach)
    assert count > 30
    for nth in range(1, count + 1):
        attached = attach(model, pipeline, compile=compile)
        with Break(nth), pytest.raises(Fault):
            attached.detach()
        attached.detach()
        assert snapshot(model) == before, nth


def test_changes_meanwhile(llama):
    """Of the config, of the attention's name, of hooks and of generate."""
    plain = llama.generate(**prompt([9]), max_new_tokens=4, do_sample=False)
    before = snapshot(llama)
    config = llama.config
    for change in (
        lambda: setattr(config, "num_hidden_layers", 1),
        lambda: llama.set_attn_implementation("eager"),
        lambda: setattr(config, "_attn_implementation", "eager"),
        lambda: setattr(llama, "generate", print),
        lambda: llama.__dict__.pop("generate"),
    ):
        attach(llama, pipelines()["gate"])
        change()
        detach(llama)
        config.num_hidden_layers = 2
        assert snapshot(llama) == before
    for holder in (llama, llama.model):
        attach(llama, pipelines()["gate"])
        holder.config = copy.deepcopy(config)
        detach(llama)
        assert holder.config._attn_implementation == config._attn_implementation == "sdpa"
        holder.config = config
    llama.config = llama.model.config = config
    assert snapshot(llama) == before
    assert plain.equal(llama.generate(**prompt([9]), max_new_tokens=4, do_sample=False))


def test_hooks_of_others_stay(llama):
    def other(*args):
        pass

    with attach(llama, pipelines()["gate"]):
        handle = llama.model.register_forward_hook(other)
    assert list(llama.model._forward_hooks.values()) == [other]
    handle.remove()


def test_models_that_are_refused_are_not_touched():
    causal = tiny(layers=1)
    causal.model.layers[0].self_attn.is_causal = False
    weighing = tiny(layers=1, attn_implementation="eager", output_attentions=True)
    other = transformers.BloomForCausalLM(
        transformers.BloomConfig(n_layer=1, n_head=2, hidden_size=32)
    )
    refused = ((causal, "^is_causal"), (weighing, "^output_attentions"), (other, "BloomAttention"))
    for model, match in refused:
        before = snapshot(model)
        with pytest.raises(Exception, match=match):
            attach(model, CachePipeline(window=5))
        assert snapshot(model) == before
