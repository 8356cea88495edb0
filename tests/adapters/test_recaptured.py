"""A captured step is not replayed after the model has changed under it."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, LocalAttention
from kvpolicy.adapters.hf import attach, capture
from kvpolicy.adapters.hf.held_fast import HOOKED, hooks_of, others_in
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from tests.support.adapters.models import pipelines, prompt, tiny
from tests.support.adapters.rehearsed import rehearsed

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"  # asked for by PEFT
)


class Before(LocalAttention):
    """Asks for keys before RoPE."""

    needs = frozenset({"key_pre"})


def lora():
    """Two adapters, the first of them active."""
    peft = pytest.importorskip("peft")
    model = None
    torch.manual_seed(5)
    for name in ("default", "other"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        if model is None:
            model = peft.get_peft_model(tiny(), config)
        else:
            model.add_adapter(name, config)
    return model.eval()


CHANGES = {
    "dtype": lambda model: model.to(torch.float64),
    "adapter": lambda model: model.set_adapter("other"),
    "none": lambda model: model.base_model.disable_adapter_layers(),
    "scale": lambda model: [m.set_scale("default", 3.0) for m in tuned(model)],
    "merged": lambda model: model.merge_adapter(),
    "hook": lambda model: inner(model).register_forward_hook(lambda module, args, output: -output),
    "forward": lambda model: setattr(inner(model), "forward", torch.zeros_like),
    "weight": lambda model: setattr(inner(model), "weight", torch.nn.Parameter(-weight(model))),
}


def tuned(model):
    return [module for module in model.modules() if hasattr(module, "set_scale")]


def inner(model):
    return model.get_base_model().model.layers[1].mlp.up_proj


def weight(model):
    return inner(model).weight.detach().clone()


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_graph_holds(change):
    """Attaching and generating leave it as it is, and so does a value that changes in place."""
    model = lora()
    base = model.get_base_model()
    before = capture.HeldFast(base)
    for pipeline in (CachePipeline(window=5), pipelines()["gate"]):
        with attach(model, pipeline):
            model.generate(**prompt([9]), max_new_tokens=3)
            assert before.still()
    inner(model).weight.mul_(2)
    assert before.still()
    CHANGES[change](model)
    assert not before.still()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("given", [True, False], ids=["a cache of one's own", "private"])
@pytest.mark.parametrize("change", [name for name in CHANGES if name != "dtype"])
def test_a_changed_model_is_captured_anew(change, given):
    """The same tokens as from a fresh cache; a hook makes steps eager, and runs in each."""
    model, ids = lora().to("cuda"), prompt([40])["input_ids"].cuda()
    options = {"max_new_tokens": 24, "do_sample": False}
    with attach(model, CachePipeline(window=16)) as attached:
        cache = attached.new_cache() if given else None
        before = model.generate(input_ids=ids, past_key_values=cache, **options)
        CHANGES[change](model)
        if given:
            cache.reset()
        after = model.generate(input_ids=ids, past_key_values=cache, **options)
        fresh = model.generate(input_ids=ids, past_key_values=attached.new_cache(), **options)
        hooked = f"eager: {HOOKED}"
        assert attached.decoding == (hooked if change == "hook" else "captured")
    assert torch.equal(after, fresh)
    assert torch.equal(after, before) == (change == "merged")


def test_hooks_of_others_run_in_every_step():
    """And those of the whole of torch; without them steps are captured again."""
    model, seen = tiny(), []
    module = model.model.layers[1].mlp.up_proj

    def counts(module, *rest):
        seen.append(module)

    with rehearsed(), attach(model, CachePipeline(window=5)) as attached:
        for register in (
            module.register_forward_hook,
            lambda hook: module.register_forward_pre_hook(
                lambda module, args: counts(module, 0, 0)
            ),
            torch.nn.modules.module.register_module_forward_hook,
        ):
            model.generate(**prompt([9]), max_new_tokens=8)
            assert attached.decoding == "captured"
            handle = register(counts)
            model.generate(**prompt([9]), max_new_tokens=8)
            handle.remove()
            assert attached.decoding == f"eager: {HOOKED}"
            assert sum(x is module for x in seen) == 8
            seen.clear()
        model.generate(**prompt([9]), max_new_tokens=8)
        assert attached.decoding == "captured"


def test_hooks_that_transformers_keeps_are_no_others():
    """It installs them when hidden states are first asked for, and leaves them."""
    model = tiny()
    with rehearsed(), attach(model, CachePipeline(window=5)) as attached:
        model(**prompt([9]), output_hidden_states=True)
        assert any(module._forward_hooks for module in model.model.layers)
        model.generate(**prompt([9]), max_new_tokens=8)
        assert attached.decoding == "captured"


@pytest.mark.parametrize("name, changes", [("llama", {}), ("olmo", {"clip_qkv": 0.5})])
def test_hooks_of_ours_are_no_others(name, changes):
    """Whatever they keep: outputs of a submodule, or by what keys are rotated back."""
    model = tiny_model(name, **changes).eval()
    with attach(model, CachePipeline(admission=Before(window=5))):
        hooks = hooks_of(model)
        assert sum(map(len, hooks)) > 4 and not others_in(hooks)
