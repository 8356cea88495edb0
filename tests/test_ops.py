"""The functional ops: each is the backend's op, chosen by where the tensors are."""

from __future__ import annotations

import torch

from kvpolicy import CachePipeline, CacheSpec, RandomGate, ops, reference
from kvpolicy.types import Segments


def test_write_gate(device: torch.device) -> None:
    heads, tokens, dim, width = 2, 5, 16, 8
    shapes = ((dim,), (dim,), (heads, width, 2 * dim), (heads, width), (heads, width), (heads,))
    pre, post = (torch.randn(heads, tokens, dim, device=device) for _ in range(2))
    weights = [torch.randn(*shape, device=device) for shape in shapes]
    got = ops.write_gate(pre, post, *weights)
    want = reference.write_gate(*(x.double().cpu() for x in (pre, post, *weights)))
    torch.testing.assert_close(got.double().cpu(), want, atol=1e-5, rtol=1e-5)


def test_attention_over_a_cache_that_the_pipeline_wrote(device: torch.device) -> None:
    spec = CacheSpec(layers=1, heads=4, kv_heads=2, head_dim=16, page_size=4, device=device)
    pipeline = CachePipeline(admission=RandomGate(sparsity=0.4), window=6)
    state = pipeline.init(spec)
    q, k, v = (torch.randn(h, 40, 16, device=device) for h in (4, 2, 2))
    pipeline.begin(state, [40], "prompt")
    want = pipeline.attend(state, 0, q, k, v)
    pipeline.commit(state)
    layer, numbers = state.layers[0], torch.tensor([0, 40], dtype=torch.int32, device=device)
    pages = layer.pool.pages
    flags = torch.zeros(2, 40, dtype=torch.uint8, device=device)
    for head in range(2):  # those still in the window do not matter: it is read anyway
        flags[head, state.kept(0, 0, head)] = 1
    segments = Segments((0, 40), (0, 40), (0,), numbers, numbers, numbers[:1])
    got = ops.prefill_attention(
        q, k, v, flags, segments, pages, layer.table, layer.counts, 6, spec.softmax_scale
    )
    torch.testing.assert_close(got, want)

    token = [torch.randn(1, h, 16, device=device) for h in (4, 2, 2)]
    pipeline.begin(state, [1], "decode")
    want = pipeline.attend(state, 0, *(x[:, :, None] for x in token))[:, :, 0]
    lengths, active = torch.tensor([40], device=device), torch.ones(1, device=device).bool()
    ring = (layer.ring_k, layer.ring_v)
    scale = spec.softmax_scale
    got = ops.paged_decode(
        token[0], pages, layer.table, layer.counts, *ring, lengths, active, 6, scale
    )
    torch.testing.assert_close(got, want)
