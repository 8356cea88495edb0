"""Training of Judge Q's query tokens: to look at a context as the answer's tokens do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._fields import check_int, check_number
from ..adapters.hf.rule.untouched import all_named
from ..adapters.hf.wrappers import fully_sharded
from ..errors import UnsupportedError


@torch.enable_grad()
def train_judge(
    model: PreTrainedModel,
    samples: Sequence[tuple[Tensor, Tensor]],
    *,
    tokens: int = 16,
    steps: int = 200,
    learning_rate: float = 1e-2,
    seed: int = 0,
    told: Callable[[int, float], object] = lambda step, loss: None,
) -> Tensor:
    """Input embeddings `[tokens, hidden]` whose attention to a context is that of its answer.

    Liu et al., 2025. Every step takes one sample: the mean attention map of the answer's tokens
    over the context is the target for that of the trained tokens behind the context, in every
    layer and head, by the mean squared error in units of 1 / context tokens. Nothing of the model
    changes. Whole maps are formed: contexts of some thousand tokens.

    Args:
        model: with nothing attached.
        samples: ids of contexts `[N]` and of their answers `[M]`.
        tokens: how many are trained.
        steps: updates, of one sample each.
        learning_rate: of Adam.
        seed: of the first embeddings, which are those of random tokens of the vocabulary.
        told: called with each step, from 0, and its loss.

    Raises:
        ValueError: an argument has no meaning.
        UnsupportedError: `fully_shard` splits the model's weights.
    """
    check_int("tokens", tokens, 1)
    check_int("steps", steps, 1)
    check_number("learning_rate", learning_rate, "a number above 0", lambda x: x > 0)
    if not samples:
        raise ValueError("samples: wanted at least one context with its answer, got none")
    if fully_sharded(model):
        raise UnsupportedError("model: Judge Q's tokens are trained on whole weights, not on parts")
    embed = model.get_input_embeddings()
    rng = torch.Generator().manual_seed(seed)
    first = torch.randint(embed.num_embeddings, (tokens,), generator=rng)  # type: ignore[call-overload]
    start = embed(first.to(model.device)).detach().float()
    found = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([found], lr=learning_rate)
    with all_named(model, "eager"):  # the only one that gives maps
        for step in range(steps):
            context, answer = (x.to(model.device) for x in samples[step % len(samples)])
            with torch.no_grad():
                wanted = _looked(model, embed(torch.cat([context, answer]))[None], len(context))
            soft = torch.cat([embed(context).detach(), found.to(embed.weight.dtype)])
            looked = _looked(model, soft[None], len(context))
            errors = [(a - b).square().mean() for a, b in zip(looked, wanted, strict=True)]
            loss = torch.stack(errors).mean() * len(context) ** 2
            optimiser.zero_grad()
            found.grad = torch.autograd.grad(loss, found)[0]
            optimiser.step()
            told(step, loss.item())
    return found.detach()


def _looked(model: PreTrainedModel, embeds: Tensor, context: int) -> list[Tensor]:
    """The mean attention `[Hq, context]` of the tokens behind a context, layer by layer."""
    maps = model.base_model(inputs_embeds=embeds, output_attentions=True, use_cache=False)
    return [x[0, :, context:, :context].float().mean(1) for x in maps.attentions if x is not None]
