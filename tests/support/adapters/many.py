"""Many requests, and each alone."""

from __future__ import annotations

import torch

from kvpolicy.adapters.hf import Request


def prompts(lengths, seed=7):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 200, (n,), generator=rng).tolist() for n, _ in lengths]


def alone(model, ids, most, **options):
    options = {"do_sample": False, **options}
    out = model.generate(torch.tensor([ids]), max_new_tokens=most, **options)
    return out[0, len(ids) :].tolist()


def many(attached, given, **options):
    """Finished requests by id; `given` are ids and new tokens."""
    requests = [
        Request(ids, id=n, max_new_tokens=most, do_sample=False)
        for n, (ids, most) in enumerate(given)
    ]
    return {x.id: x for x in attached.generate_many(requests, **options)}
