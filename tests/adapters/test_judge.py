"""Judge Q on a model: what trained tokens look at behind the prompt."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, JudgeQ, PhaseError
from kvpolicy._files import write_safetensors
from kvpolicy.adapters.hf import attach
from tests.support.adapters.models import SIZES, prompt

WINDOW, KEPT = 4, 15
CONTEXT = prompt([37])["input_ids"]


def judge(model, count=3):
    torch.manual_seed(3)
    return torch.randn(count, model.config.hidden_size)


def test_a_prompt_keeps_what_the_tokens_look_at(llama):
    policy = JudgeQ(budget=KEPT, embeds=judge(llama))
    embeds = torch.cat([llama.get_input_embeddings()(CONTEXT), policy.embeds_for()], 1)
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        maps = llama(inputs_embeds=embeds, output_attentions=True).attentions
    pipeline, length = CachePipeline(eviction=policy, window=WINDOW), CONTEXT.shape[1]
    with attach(llama, pipeline, **SIZES) as attached, torch.no_grad():
        cache = attached.new_cache()
        llama(CONTEXT, past_key_values=cache)
        attached.replay(cache, inputs_embeds=policy.embeds_for(), sinks=0)
        cache.end_prompt()
        for layer, x in enumerate(maps):
            heads = x[0, :, length:, : length - WINDOW].double().sum(1)
            scores = heads.unflatten(0, (llama.config.num_key_value_heads, -1)).mean(1)
            best = scores.topk(KEPT - WINDOW).indices.sort().values.tolist()
            for head, chosen in enumerate(best):
                recent = list(range(length - WINDOW, length))
                assert cache.state.kept(layer, 0, head).tolist() == chosen + recent


def test_ids_or_embeddings_but_not_both(llama):
    policy = JudgeQ(budget=KEPT, embeds=judge(llama))
    with attach(llama, CachePipeline(eviction=policy, window=WINDOW), **SIZES) as attached:
        cache = attached.new_cache()
        with torch.no_grad():
            llama(CONTEXT, past_key_values=cache)
        with pytest.raises(ValueError, match="input_ids, inputs_embeds: wanted one of them, got n"):
            attached.replay(cache)
        with pytest.raises(ValueError, match="input_ids, inputs_embeds: wanted one of them, got b"):
            attached.replay(cache, CONTEXT, inputs_embeds=policy.embeds_for())
        with pytest.raises(ValueError, match=r"inputs_embeds: wanted \[B, S, hidden\]"):
            attached.replay(cache, inputs_embeds=policy.embeds)
        with pytest.raises(PhaseError):
            cache.end_prompt()


def test_tokens_of_a_file_are_the_same(tmp_path):
    policy = JudgeQ(budget=KEPT, embeds=torch.randn(4, 8))
    policy.save(tmp_path / "judge.safetensors")
    again = JudgeQ.from_pretrained(tmp_path, "judge.safetensors", budget=KEPT)
    assert torch.equal(again.embeds, policy.embeds)
    write_safetensors(tmp_path / "other.safetensors", {"filters": policy.embeds}, {})
    with pytest.raises(ValueError, match="wanted the key embeds, got filters"):
        JudgeQ.from_pretrained(tmp_path / "other.safetensors", budget=KEPT)
