"""The map of kept tokens says what the cache holds."""

from __future__ import annotations

import json
import re
import string

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from kvpolicy import CachePipeline, DuoAttention, LocalAttention  # noqa: E402
from kvpolicy.adapters.hf import attach, new_cache  # noqa: E402
from kvpolicy.evaluation.look.kept import kept_map  # noqa: E402
from kvpolicy.evaluation.look.kept_map import darkest, draw  # noqa: E402
from kvpolicy.evaluation.models import tiny_llama  # noqa: E402
from kvpolicy.evaluation.tasks.prompts import Example, Question  # noqa: E402

TOKENS, WINDOW = 60, 16


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {c: i for i, c in enumerate(string.printable)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    raw.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.fixture(scope="module")
def ids():
    return (torch.arange(TOKENS) * 7 % 100).tolist()


def fill(pipeline, ids):
    model = tiny_llama()
    with attach(model, pipeline), torch.no_grad():
        cache = new_cache(model, pipeline)
        model(torch.tensor([ids]), past_key_values=cache)
    return cache


def test_it_holds_what_the_policy_admits(tokenizer, ids):
    duo = DuoAttention(full_heads=((True, False), (False, False)), sinks=3, window=WINDOW)
    found = kept_map(fill(CachePipeline(admission=duo), ids), tokenizer, ids)
    at = torch.arange(TOKENS)
    streaming = (at < 3) | (at >= TOKENS - WINDOW)
    assert found.held[0, 0].all()
    for layer, head in ((0, 1), (1, 0), (1, 1)):
        assert torch.equal(found.held[layer, head], streaming)
    assert found.heads.tolist() == torch.where(streaming, 4, 1).tolist()
    assert found.fraction == pytest.approx((TOKENS + 3 * (3 + WINDOW)) / (4 * TOKENS))
    assert found.why(2) == "2: kept by 4 of 4 heads, 4 in pages"
    assert found.why(20) == "20: kept by 1 of 4 heads, 1 in pages"
    assert found.why(50) == "50: kept by 4 of 4 heads, 4 for the local window"
    with pytest.raises(IndexError, match="token"):
        found.why(TOKENS)


def test_the_page_is_one_file_with_every_token(tokenizer, ids, tmp_path):
    local = CachePipeline(admission=LocalAttention(window=WINDOW, sinks=2))
    found = kept_map(fill(local, ids), tokenizer, ids)
    found.html(tmp_path / "kept.html", title="a < b")
    page = (tmp_path / "kept.html").read_text()
    assert "a &lt; b" in page and not re.search(r"(src|href|url)\s*[=(]", page)
    assert len(re.findall(r"<span data-i=", page)) == TOKENS
    held = json.loads(re.search(r"const held = (\[.*?\]),", page)[1])
    assert held == ["1111" if i < 2 or i >= TOKENS - WINDOW else "0000" for i in range(TOKENS)]
    assert "#0f4c5c" in page.split('data-i="0"')[1][:40]
    assert "#f3f0e8" in page.split('data-i="9"')[1][:40]
    script = tokenizer.convert_tokens_to_ids("<")
    assert (script in ids) == (">&lt;</span>" in page)


def test_the_picture_is_saved(tokenizer, ids, tmp_path):
    pytest.importorskip("matplotlib")
    local = CachePipeline(admission=LocalAttention(window=WINDOW, sinks=2))
    kept_map(fill(local, ids), tokenizer, ids).png(tmp_path / "kept.png", tokenizer)
    assert (tmp_path / "kept.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_nothing_is_labelled_that_is_not_there(tokenizer, ids, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    said = []

    def texts(figure, path, **options):
        said.append(
            " / ".join(x.get_text() for x in figure.findobj(lambda y: hasattr(y, "get_text")))
        )

    monkeypatch.setattr(Figure, "savefig", texts)
    local = CachePipeline(admission=LocalAttention(window=WINDOW, sinks=2))
    found = kept_map(fill(local, ids), tokenizer, ids)
    found.png(tmp_path / "kept.png", tokenizer)
    asked = Example(context_ids=tuple(ids), questions=(Question((1, 2), tuple(ids[20:24])),))
    draw(tmp_path / "kept.png", found.held, tokenizer, asked, title="t")
    for text, answers, window in zip(said, (False, True), (True, False), strict=True):
        assert ("answers are underlined" in text) == ("red: answers" in text) == answers
        assert (f"local window: the last {WINDOW} tokens" in text) == window
    page = found._repr_html_()
    assert page.count(f"local window, {WINDOW} tokens") == 1 and page.startswith("<iframe")
    whole = kept_map(fill(CachePipeline(window=TOKENS), ids), tokenizer, ids)
    whole.png(tmp_path / "kept.png", tokenizer)
    assert whole.window == TOKENS and "local window" not in said[-1]


def test_the_picture_and_the_page_have_one_scale(tokenizer, ids):
    duo = DuoAttention(full_heads=((True, False), (False, False)), sinks=0, window=WINDOW)
    found = kept_map(fill(CachePipeline(admission=duo), ids), tokenizer, ids)
    assert darkest(found.heads / 4) == 0.25
    page = found._page("t")
    assert "kept by 25% of the heads or more" in page
    assert "#0f4c5c" in page.split('data-i="9"')[1][:40]


def test_ids_must_be_the_cache_s(tokenizer, ids):
    cache = fill(CachePipeline(), ids)
    with pytest.raises(ValueError, match="saw 60 tokens, got 59"):
        kept_map(cache, tokenizer, ids[1:])
    with pytest.raises(ValueError, match="one sequence"):
        kept_map(new_cache(tiny_llama(), CachePipeline()), tokenizer, ids)
