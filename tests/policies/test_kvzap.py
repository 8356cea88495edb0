"""KVzap against the model that its authors publish, and its files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvpolicy import CachePipeline, CacheSpec, KVzap, Write
from kvpolicy._files import read_safetensors, write_safetensors
from kvpolicy.testing import check_admission

LAYERS, HEADS, HIDDEN, UNITS = 2, 3, 24, 10


def published(deep, dtype=torch.float32):
    """Modules as NVIDIA/kvpress builds them, one a layer."""
    torch.manual_seed(5)
    one = lambda: (  # noqa: E731
        nn.Sequential(nn.Linear(HIDDEN, UNITS), nn.GELU(), nn.Linear(UNITS, HEADS))
        if deep
        else nn.Linear(HIDDEN, HEADS)
    )
    return nn.ModuleDict({"layers": nn.ModuleList(one() for _ in range(LAYERS))}).to(dtype)


def write_of(hidden, layer=0, heads=range(HEADS)):
    tokens, key = len(hidden), torch.zeros(len(heads), len(hidden), 8, dtype=hidden.dtype)
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    return Write(key, key, torch.arange(tokens), cu, layer, heads, hidden=hidden)


@pytest.fixture(params=[False, True], ids=["linear", "mlp"])
def file(request, tmp_path):
    model = published(request.param)
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), {"format": "pt"})
    return model, tmp_path / "model.safetensors"


def test_scores_are_those_of_the_published_model(file):
    model, path = file
    zap, hidden = KVzap.from_pretrained(path.parent, path.name), torch.randn(70, HIDDEN)
    for layer in range(LAYERS):
        wanted = model["layers"][layer](hidden).T
        assert torch.allclose(zap.scores(write_of(hidden, layer)), wanted, atol=1e-5)
        some = zap.scores(write_of(hidden, layer, range(1, 3)))
        assert torch.equal(some, zap.scores(write_of(hidden, layer))[1:])


def test_one_token_scores_as_among_others(file):
    zap, hidden = KVzap.from_pretrained(file[1]), torch.randn(150, HIDDEN)
    for dtype in (torch.float32, torch.bfloat16):
        placed = zap.place(torch.device("cpu"), dtype, "reference")
        together = placed.scores(write_of(hidden.to(dtype)))
        alone = [placed.scores(write_of(x[None].to(dtype))) for x in hidden]
        assert torch.equal(torch.cat(alone, 1), together)


def test_what_is_below_the_threshold_goes_when_it_leaves_the_window(file):
    """DMSPress drops `score < threshold` outside the last 128 tokens."""
    model, path = file
    zap = KVzap.from_pretrained(path, threshold=0.1)
    pipeline = CachePipeline(admission=zap, backend="reference")
    assert pipeline.window == 128
    state = pipeline.init(CacheSpec(layers=LAYERS, heads=HEADS, kv_heads=HEADS, head_dim=8))
    hidden, x = torch.randn(200, HIDDEN), torch.randn(HEADS, 200, 8)
    pipeline.begin(state, [200], "prompt")
    for layer in range(LAYERS):
        pipeline.attend(state, layer, x, x, x, hidden=hidden)
    pipeline.commit(state)
    for layer in range(LAYERS):
        scores = model["layers"][layer](hidden).T
        for head in range(HEADS):
            stays = (scores[head] >= 0.1) | (torch.arange(200) >= 200 - 128)
            assert state.kept(layer, 0, head).tolist() == stays.nonzero()[:, 0].tolist()


def test_what_is_saved_has_the_published_names(file, tmp_path):
    model, path = file
    KVzap.from_pretrained(path).save(tmp_path / "again.safetensors")
    found, _ = read_safetensors(tmp_path / "again.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layers.1.bias"), "missing key layers.1.bias"),
        (lambda state: state.update(other=torch.ones(1)), "wanted keys .*, got other"),
        (lambda state: state["layers.1.weight"].fill_(float("nan")), "layers.1.weight: wanted"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, change, message):
    state = {name: x.clone() for name, x in published(False).state_dict().items()}
    change(state)
    write_safetensors(tmp_path / "zap.safetensors", state, {})
    with pytest.raises(ValueError, match=message):
        KVzap.from_pretrained(tmp_path / "zap.safetensors")


def test_another_model_is_refused(file):
    with pytest.raises(ValueError, match=r"made for \[L, Hkv\] = \[2, 3\], the model has \[4, 3\]"):
        KVzap.from_pretrained(file[1]).check(4, 3, 8)


def test_the_contract_holds(file):
    check_admission(KVzap.from_pretrained(file[1], threshold=0.0), kv_heads=HEADS, hidden=HIDDEN)
