"""What a report adds up: bytes of a cache counted by hand, and means over heads."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import attrs
import pytest
import torch

from kvpolicy import (
    AtPromptEnd,
    CachePipeline,
    CacheSpec,
    LocalAttention,
    Quest,
    RandomGate,
    Report,
    SelectAll,
    SnapKV,
    any_of,
    per_layer,
)
from kvpolicy.store.report_ranks import joined

SPEC = CacheSpec(
    layers=2, heads=4, kv_heads=2, head_dim=8, page_size=4, rollback=3, sliding=(None, 5)
)
TOKENS = 30


@pytest.fixture(scope="module")
def report() -> Report:
    """Layer 0 keeps 2 first tokens and 6 recent ones of 30; layer 1 slides over 5."""
    pipeline = CachePipeline(
        admission=LocalAttention(window=6, sinks=2), selection=Quest(budget=10), backend="reference"
    )
    state = pipeline.init(SPEC)
    pipeline.begin(state, [TOKENS], "prompt")
    for layer in range(2):
        query, key, value = (torch.randn(heads, TOKENS, 8) for heads in (4, 2, 2))
        pipeline.attend(state, layer, query, key, value)
    pipeline.commit(state)
    return pipeline.report(state)


def test_bytes_by_hand(report: Report) -> None:
    assert report.pages == 2 * 4 * (2 * 8 * 4)  # a page a head: 4 slots of keys and values
    assert report.ring == 2 * ((6 + 3) + (5 + 3)) * (2 * 8 * 4 + 1)
    assert report.kv == report.pages + report.ring
    parts = ("reserved", "positions", "summaries", "tables", "queries")
    assert report.total == report.kv + sum(getattr(report, part) for part in parts)
    assert report.positions == 2 * 4 * 4 and report.queries == 0
    assert report.summaries == 2 * 2 * 8 * 4  # least and largest key of each page


def test_a_token_is_admitted_once() -> None:
    """Rings still hold flags of tokens that have left the window, which pages count as well."""
    pipeline = CachePipeline(window=6, backend="reference")
    state = pipeline.init(attrs.evolve(SPEC, layers=3, sliding=()), 2)
    for added in ([TOKENS, 4], [2, 3]):
        pipeline.begin(state, added, "prompt")
        for layer in range(3):
            tokens = (torch.randn(heads, sum(added), 8) for heads in (4, 2, 2))
            pipeline.attend(state, layer, *tokens)
        pipeline.commit(state)
    found = pipeline.report(state)
    assert found.admitted == [[1.0, 1.0]] * 3
    assert found.stored == found.read == [[(TOKENS + 2 + 7) / 2] * 2] * 3


def test_a_report_of_all_ranks(report: Report) -> None:
    """Ranks have other heads of the same sequences."""
    same = {"sequences", "tokens", "overshoot"}
    numbers = [n for n, x in attrs.asdict(report).items() if type(x) is int and n not in same]
    first = attrs.evolve(report, overshoot=7, prompt_read=[0.25, None])
    second = attrs.evolve(
        report, overshoot=3, prompt_read=[0.75, None], stored=[[1.0], [2.0]],
        admitted=[[0.5], None],
        **{name: getattr(report, name) + 1000 + n for n, name in enumerate(numbers)},
    )  # fmt: skip
    for reports in ([first, second], [second, first]):
        found = joined(reports)
        for n, name in enumerate(numbers):
            assert getattr(found, name) == 2 * getattr(report, name) + 1000 + n, name
        assert (found.sequences, found.tokens, found.overshoot) == (1, TOKENS, 7)
        assert found.stored == [a + b for a, b in zip(*(x.stored for x in reports), strict=True)]
        assert found.admitted == [reports[0].admitted[0] + reports[1].admitted[0], None]
        assert found.prompt_read == [0.5, None]
        assert found.ranks == reports


def test_means_leave_out_layers_that_slide(report: Report) -> None:
    assert report.sliding_layers == [1] and report.admitted[1] is None
    assert report.admitted[0] == pytest.approx([2 / TOKENS, 2 / TOKENS])
    assert report.mean_admitted == pytest.approx(2 / TOKENS)
    assert report.stored == [[8.0, 8.0], [5.0, 5.0]]
    assert report.mean_read == pytest.approx((8 + 8 + 5 + 5) / 4)


def test_means_of_unequal_heads(report: Report) -> None:
    other = attrs.evolve(report, admitted=[[0.5, 0.1], [0.0, 0.2]], read=[[1.0, 2.0], [3.0, 8.0]])
    assert other.mean_admitted == pytest.approx(0.2) and other.mean_read == 3.5
    assert attrs.evolve(report, admitted=[None, None]).mean_admitted == 1.0


def test_dense_by_hand(report: Report) -> None:
    token = 2 * 2 * 8 * 4  # keys and values of two heads
    assert report.dense == (TOKENS + 5) * token
    assert report.sequences == 1


def cells(report: Report) -> dict[str, list[str]]:
    """The printed rows by name, cells apart."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in str(report).split("\n") if line]
    return {row[0]: row[1:] for row in rows}


def test_print_is_a_table(report: Report) -> None:
    found = cells(report)
    assert next(iter(found)) == "cache of 1 sequence, 30 tokens; 2 layers, 4 KV heads"
    dense, held = report.dense, report.kv
    assert found["keys and values, dense"] == [f"{dense:,}", "4.38 KiB", "100.0%"]
    assert found["keys and values, held"][::2] == [f"{held:,}", f"{held / dense:.1%}"]
    assert found["everything"][::2] == [f"{report.total:,}", f"{report.total / dense:.1%}"]
    assert found["in pages"][0] == f"{report.pages:,}" and found["queries observed"][1] == "0 B"
    assert found["admitted"] == ["6.7%", "6.7%", "6.7%"]
    assert found["held"] == found["read by the last token"] == ["6.5", "5", "8"]
    assert found["admission"] == ["LocalAttention on all layers: admitted 6.7% of the tokens"]
    assert found["selection"] == ["Quest on all layers: the last token read 8 of 8"]
    assert found["eviction"] == ["none"]
    assert found["no policy"] == ["on layer 1, which slides over a window of the model's"]
    assert "noted" not in found and "Report(" not in str(report)


def test_print_says_where_and_what() -> None:
    """Per layer, with members inside, after an eviction, for two sequences."""
    gate = any_of(RandomGate(sparsity=0.5), LocalAttention(window=6, sinks=2))
    pipeline = CachePipeline(
        admission=per_layer(LocalAttention(window=6), {1: gate}),
        selection=per_layer(Quest(budget=10), {range(2, 4): SelectAll()}),
        eviction=per_layer(
            SnapKV(budget=8, observation=6), {3: AtPromptEnd(admission=RandomGate(sparsity=0.9))}
        ),
        backend="reference",
    )
    spec = attrs.evolve(SPEC, layers=5, sliding=(), max_tokens=40)
    state = pipeline.init(spec, 2)
    pipeline.begin(state, [TOKENS, 20], "prompt")
    for layer in range(5):
        query, key, value = (torch.randn(heads, TOKENS + 20, 8) for heads in (4, 2, 2))
        pipeline.attend(state, layer, query, key, value)
    pipeline.commit(state)
    pipeline.end_prompt(state)
    report = pipeline.report(state)
    assert report.policies == {
        "admission": {
            "LocalAttention": [0, 2, 3, 4],
            "AnyOf(RandomGate, LocalAttention)": [1],
        },
        "selection": {"Quest": [0, 1, 4]},
        "eviction": {"SnapKV": [0, 1, 2, 4], "AtPromptEnd(RandomGate)": [3]},
    }
    said, dropped = str(report), sum(sum(report.evicted[n]) for n in (0, 1, 2, 4))
    assert "cache of 2 sequences, 50 tokens; 5 layers, 10 KV heads" in said
    assert "Quest on all layers but 2-3: the last token read " in said
    assert "AnyOf(RandomGate, LocalAttention) on layer 1: admitted " in said
    assert f"SnapKV on all layers but 3: evicted {dropped / 16:.1f} tokens of a head" in said
    assert cells(report)["seen"] == ["25"]


def test_print_notes_what_is_rare(report: Report) -> None:
    rare = attrs.evolve(report, floored=[1, 0], shared_pages=3, cap_evicted=1, overshoot=2)
    found = cells(rare)
    assert found["budget"] == ["below the window, which was kept instead, on layer 0"]
    assert found["forks"] == ["3 pages shared"]
    assert found["cap"] == ["1 token evicted because it was reached"]
    assert found["overshoot"] == ["2 tokens over max_tokens in a prompt call"]


def test_an_empty_cache_prints() -> None:
    pipeline = CachePipeline(eviction=SnapKV(budget=40))
    report = pipeline.report(pipeline.init(SPEC))
    assert report.dense == 0 and cells(report)["keys and values, dense"] == ["0", "0 B"]


class Rows(HTMLParser):
    """Cells of every row; fails where a tag is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_notebooks_get_the_same_table(report: Report) -> None:
    named = attrs.evolve(report, policies={"admission": {"A<b>&C": [0]}})
    parser = Rows()
    parser.feed(named._repr_html_())
    assert not parser.open and "<b>" not in named._repr_html_()
    lines = [line for line in str(named).split("\n") if line]
    assert len(parser.rows) == len(lines) - 1  # the title is a caption
    found = {row[0].strip(): [x for x in row[1:] if x] for row in parser.rows}
    assert found == {name: row for name, row in [*cells(named).items()][1:]}
