"""The functional ops: each is the backend's op, chosen by where the tensors are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, RandomGate, ops, reference
from kvpolicy.ops import Heads, Segments, load

CONTRACT = {
    name: op for name, op in inspect.getmembers(ops.Ops, inspect.isfunction) if name[0] != "_"
}


def parameters(op: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """What a caller sees of each parameter, and of the result."""
    types = get_type_hints(op)
    found = {
        name: (place, x.kind, x.default, types[name])
        for place, (name, x) in enumerate(
            (n, x) for n, x in inspect.signature(op).parameters.items() if n != "self"
        )
    }
    return found | {"return": (types["return"],)}


def test_the_contract_has_every_op() -> None:
    assert len(CONTRACT) == 37
    assert all(op.__doc__ for op in CONTRACT.values())
    for backend in ("reference", "triton"):
        with pytest.raises(AttributeError):
            load(backend).another_op  # noqa: B018


@pytest.mark.parametrize("name", CONTRACT)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_backend_has_the_signature_of_the_contract(backend: str, name: str) -> None:
    assert parameters(getattr(load(backend), name)) == parameters(CONTRACT[name])


@pytest.mark.parametrize("name", ["write_gate", "prefill_attention", "paged_decode"])
def test_a_function_has_the_signature_of_the_contract(name: str) -> None:
    assert parameters(getattr(ops, name)) == parameters(CONTRACT[name])


def test_a_ring_holds_a_position_where_it_says() -> None:
    ring = ops.Ring(*(torch.zeros(1, 1, 7, *rest) for rest in ((2,), (2,), ())))
    assert ring.slots == 7
    assert [ring.slot(p) for p in (0, 6, 7, 20)] == [0, 6, 0, 6]
    assert ring.slot(torch.tensor([-1, 20])).tolist() == [6, 6]


def test_places_of_packed_keys() -> None:
    numbers = [(0, 2, 2, 3), (0, 5, 5, 6), (9, 40, 0)]
    segments = ops.Segments(*numbers, *(torch.tensor(n, dtype=torch.int32) for n in numbers))
    rows, at, ends = segments.places()
    assert rows.tolist() == [0] * 5 + [2]
    assert at.tolist() == [6, 7, 8, 9, 10, 0]
    assert ends.tolist() == [11] * 5 + [1]


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
    pages, heads = layer.pool.pages, Heads(layer.table, layer.counts)
    flags = torch.zeros(2, 40, dtype=torch.uint8, device=device)
    for head in range(2):  # those still in the window do not matter: it is read anyway
        flags[head, state.kept(0, 0, head)] = 1
    segments = Segments((0, 40), (0, 40), (0,), numbers, numbers, numbers[:1])
    got = ops.prefill_attention(q, k, v, flags, segments, pages, heads, 6, spec.softmax_scale)
    torch.testing.assert_close(got, want)

    token = [torch.randn(1, h, 16, device=device) for h in (4, 2, 2)]
    pipeline.begin(state, [1], "decode")
    want = pipeline.attend(state, 0, *(x[:, :, None] for x in token))[:, :, 0]
    lengths, active = torch.tensor([40], device=device), torch.ones(1, device=device).bool()
    got = ops.paged_decode(
        token[0], pages, heads, layer.ring, lengths, active, 6, spec.softmax_scale
    )
    torch.testing.assert_close(got, want)
