"""Gates trained for models of every kind: what a student computes, and its gradients.

The student with hard gates is what a cache with the same gates computes, by other code; a softened
one's gradients are differences of its loss in float64.
"""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, UnsupportedError, WriteGate
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.models import served
from kvpolicy.adapters.hf.rule.tiny import causal_types, tiny_model
from kvpolicy.adapters.hf.training import attach_for_training
from kvpolicy.adapters.hf.wrappers import decoder_of
from kvpolicy.training.gate import WriteGates
from kvpolicy.training.student import gated_forward
from tests.support.adapters.versions import NEWEST

# Softcap, sinks, chunks and no RoPE, states beside attention and in it, values of other sizes,
# keys shared, fused or of several sizes, modules that attend for several layers, no list "layers".
KINDS = (
    "gemma2", "gpt_oss", "llama4_text", "qwen3_5_text", "falcon_h1", "mimo_v2_flash",
    "gemma3n_text", "gemma4_text", "phi3", "hrm_text", "zamba2", "gpt2", "whisper",
)  # fmt: skip
WINDOW, LENGTH, THRESHOLD = 5, 24, 0.5


def ids():
    return torch.randint(20, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def made(model):
    """Gates that admit about half of the tokens."""
    torch.manual_seed(2)
    gates = WriteGates.for_model(model)
    with torch.no_grad():
        for layer in gates.layers:
            layer.conv2.weight.normal_()
            layer.conv2.bias.zero_()
    return gates


def policy(gates):
    return WriteGate(**gates.fields(), window=WINDOW, threshold=THRESHOLD)


def far(found, wanted):
    return float((found - wanted).abs().max() / wanted.std())


def cached(model, pipeline):
    """The final hidden states of a forward with a pipeline."""
    with attach(model, pipeline, page_size=4) as attached:
        decoder = attached.decoder
        out = decoder(input_ids=ids(), past_key_values=attached.new_cache(), use_cache=True)
        return out.last_hidden_state


@torch.no_grad()
def check(name):
    model = tiny_model(name).eval()
    acts = any(layer.window is None for layer in served(model).layers)
    plain = decoder_of(model)(input_ids=ids(), use_cache=False).last_hidden_state
    gates = made(model)
    with attach_for_training(model) as attached:
        teacher = attached.hidden(ids())
        if acts:
            student = gated_forward(attached, gates, ids(), window=WINDOW, threshold=THRESHOLD)
    assert far(teacher, plain) < 1e-4
    if not acts:
        return
    kept = (student.gate > THRESHOLD).double().mean()
    assert 0.1 < kept < 0.9
    wanted = cached(model, CachePipeline(admission=policy(gates)))
    assert far(student.hidden, wanted) < 1e-4
    assert far(student.hidden, plain) > 1e-2  # the gates did something


@pytest.mark.parametrize("name", KINDS)
def test_a_student_is_what_the_cache_computes(name):
    check(name)


@NEWEST
@pytest.mark.slow
@pytest.mark.parametrize("name", causal_types())
def test_every_served_type(name):
    try:
        model = tiny_model(name)
        with attach(model, CachePipeline(window=WINDOW, admission=policy(made(model)))):
            pass
    except UnsupportedError:
        return  # what cannot run with gates is refused, or its layers differ
    except Exception as error:
        pytest.skip(f"transformers does not build it: {error}")
    check(name)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gemma3n_text", "zamba2"])
def test_gradients_are_differences_of_the_loss(name, checkpointing):
    # Of experts all, since another choice of them is a jump.
    changes = {"num_experts_per_tok": 4} if name == "gpt_oss" else {}
    model = tiny_model(name, **changes).eval().double()
    if changes:
        model.set_experts_implementation("eager")  # the others have no float64
    gates = made(model).double()
    direction = {n: torch.randn(p.shape).double() for n, p in gates.named_parameters()}
    probe = None

    def loss(attached):
        nonlocal probe
        hidden = gated_forward(attached, gates, ids(), window=WINDOW).hidden
        probe = torch.randn(hidden.shape).to(hidden) if probe is None else probe
        return (hidden * probe).mean()

    def moved(step):
        with torch.no_grad():
            for n, p in gates.named_parameters():
                p.add_(step * direction[n])

    with attach_for_training(model, checkpointing=checkpointing) as attached:
        loss(attached).backward()
        slope = sum(
            float((p.grad * direction[n]).sum())
            for n, p in gates.named_parameters()
            if p.grad is not None  # of layers that slide
        )
        size, at, found = 1e-3, 0, {}
        for step in (-2, -1, 1, 2):
            moved(size * (step - at))
            at = step
            with torch.no_grad():
                found[step] = float(loss(attached))
    # Of fourth order: norms compute in float32, which smaller steps would show.
    near, wide = found[1] - found[-1], found[2] - found[-2]
    assert slope == pytest.approx((8 * near - wide) / (12 * size), rel=1e-3)
    assert abs(slope) > 1e-4
