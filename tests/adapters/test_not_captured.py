"""What cannot be captured decodes eagerly and says why; captures and other threads get along."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy import CachePipeline, Quest, RandomGate
from kvpolicy.adapters.hf import attach

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DENSE = CachePipeline(window=16)
SPARSE = CachePipeline(admission=RandomGate(sparsity=0.3), selection=Quest(budget=48), window=16)
GREEDY = {"do_sample": False, "max_new_tokens": 24, "return_dict_in_generate": True}


ROPES = {
    "linear": {},
    "yarn": {"original_max_position_embeddings": 32},
    "llama3": {
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32
    },
    "longrope": {
        "short_factor": [1.0] * 32, "long_factor": [1.0 + n / 8 for n in range(32)],
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def tiny(seed: int = 0, rope: str = "default") -> LlamaForCausalLM:
    """Eager attention in float32; with "dynamic" frequencies every forward asks the device."""
    torch.manual_seed(seed)
    stretch = {"rope_type": rope, "rope_theta": 10_000.0, "factor": 2.0, **ROPES.get(rope, {})}
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=7, attn_implementation="eager",
        rope_parameters=stretch,
    )  # fmt: skip
    return LlamaForCausalLM(config).cuda().eval()


def prompt(rows: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, 512, (rows, 60), generator=g).cuda()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_model_that_asks_the_device() -> None:
    model, inputs = tiny(rope="dynamic"), prompt()
    plain = model.generate(**inputs, **GREEDY)
    with attach(model, DENSE) as attached:
        for _ in range(2):
            found = model.generate(**inputs, **GREEDY)
            assert torch.equal(found.sequences, plain.sequences)
            report, cache = found.past_key_values.report(), found.past_key_values
            assert report.tokens == sum(cache.state.lengths)
    why = r"eager: the capture failed at modeling_rope_utils\.py:\d+: .*CUDA error"
    assert re.match(why, attached.decoding), attached.decoding
    other = tiny(seed=1)
    wanted = other.generate(**inputs, **GREEDY)
    with attach(other, DENSE) as attached:
        found = other.generate(**inputs, **GREEDY)
    assert attached.decoding == "captured"
    assert torch.equal(found.sequences, wanted.sequences)


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3", "longrope"])
def test_other_ways_to_stretch_positions_are_captured(rope) -> None:
    """Beyond the positions of training too. Older versions ask the device where longrope is."""
    model, inputs = tiny(rope=rope), prompt()
    options = {**GREEDY, "output_logits": True}
    plain = model.generate(**inputs, **options)
    with attach(model, DENSE) as attached:
        for _ in range(2):
            found = model.generate(**inputs, **options)
            far = [(a - b).abs().max() for a, b in zip(found.logits, plain.logits, strict=True)]
            assert torch.equal(found.sequences, plain.sequences) and max(far) < 1e-3
    asks = rope == "longrope" and attached.decoding.startswith("eager: the capture failed at ")
    assert attached.decoding == "captured" or asks


@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_rows_that_end_early(rope) -> None:
    """Their columns are padding in the cache, however the steps were run."""
    model, inputs = tiny(rope=rope), prompt(rows=3)
    with torch.no_grad():  # the first row ends with its second token
        first = model.generate(**inputs, do_sample=False, max_new_tokens=2)[0, -1]
    options = {**GREEDY, "eos_token_id": int(first)}
    plain = model.generate(**inputs, **options)
    with attach(model, DENSE):
        found = model.generate(**inputs, **options)
    assert torch.equal(found.sequences, plain.sequences)
    cache = found.past_key_values
    stored = cache.real().sum(1).tolist()
    assert stored == cache.state.lengths and stored[0] < max(stored)


def test_threads() -> None:
    """Two models capture again and again while a third thread pins memory and synchronises."""
    models = [tiny(seed) for seed in (0, 1)]
    inputs = [prompt(seed=seed) for seed in (1, 2)]
    with attach(models[0], SPARSE), attach(models[1], SPARSE):
        alone = [m.generate(**x, **GREEDY).sequences for m, x in zip(models, inputs, strict=True)]
        found, errors, over = [[], []], [], threading.Event()

        def generate(n: int) -> None:
            try:
                for _ in range(6):
                    found[n].append(models[n].generate(**inputs[n], **GREEDY).sequences)
            except BaseException as error:
                errors.append(error)

        def load() -> None:
            try:
                while not over.is_set():
                    host = torch.ones(1 << 16).pin_memory()
                    host.to("cuda", non_blocking=True).sum().item()
                    torch.empty(1 << 20, device="cuda")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=generate, args=(n,)) for n in (0, 1)]
        loader = threading.Thread(target=load)
        for thread in (*threads, loader):
            thread.start()
        for thread in threads:
            thread.join()
        over.set()
        loader.join()
    assert not errors
    for sequences, wanted in zip(found, alone, strict=True):
        assert len(sequences) == 6 and all(torch.equal(x, wanted) for x in sequences)
