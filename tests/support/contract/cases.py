"""Policies of every kind, sized so that each has something to do, and sizes of caches."""

from __future__ import annotations

import attrs
import torch
from hypothesis import strategies as st

from kvpolicy import (
    GKV,
    H2O,
    LUKV,
    RKV,
    TOVA,
    AcrossLayers,
    AdaEA,
    Adaptive,
    AdmitAll,
    AtPromptEnd,
    CachePipeline,
    CacheSpec,
    CapKV,
    CriticalKV,
    DBudgetKV,
    DuoAttention,
    ExpectedAttention,
    FastGen,
    FastKVzip,
    FlexPrefill,
    HeadKV,
    JudgeQ,
    KeepAll,
    KeyDiff,
    Knorm,
    KVzap,
    KVzip,
    LagKV,
    LazyLayers,
    LocalAttention,
    PerPhase,
    Pyramid,
    QFilters,
    Quest,
    RandomGate,
    Ranked,
    Ratio,
    SageKV,
    SelectAll,
    Selection,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    Tokens,
    TopChannels,
    TotalCap,
    TriAttention,
    TrimKV,
    VerticalSlash,
    WriteGate,
    XAttention,
    all_of,
    any_of,
    per_layer,
)


@attrs.frozen(kw_only=True)
class LargestKey(Selection):
    """A user's selection, without a fused op: pages by q . (largest key of each channel)."""

    budget: Tokens
    first: int = 0
    last: int = 0
    group: str = "max"

    def summarize(self, keys, valid):
        return keys.masked_fill(~valid[..., None], float("-inf")).amax(1)

    def score(self, query, summary, counts):
        summary = summary[:, :, None].float().masked_fill(counts[:, :, None, :, None] == 0, 0)
        return (query[:, :, :, None].float() * summary).sum(-1)


@attrs.frozen
class Sizes:
    """A spec with its window; `room` global tokens a head is more than every budget below."""

    spec: CacheSpec
    window: int

    @property
    def room(self):
        return 3 * self.spec.page_size + 10

    @property
    def kept(self):
        """Tokens of an eviction's budget: the window and more than two pages."""
        return self.window + 2 * self.spec.page_size + 1

    @property
    def length(self):
        """A prompt that leaves every policy something to do."""
        return self.window + 2 * self.room + 8


def gate(sizes, seed=0, window=None):
    """A write gate with random weights that admits about half of the tokens."""
    rng = torch.Generator().manual_seed(seed)
    n, heads, dim, width = sizes.spec.layers, sizes.spec.kv_heads, sizes.spec.head_dim, 5
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    return WriteGate(
        norm_pre=1 + draw(n, dim) / 8,
        norm_post=1 + draw(n, dim) / 8,
        w1=draw(n, heads, width, 2 * dim) / dim**0.5,
        b1=draw(n, heads, width) / 8,
        w2=(out := draw(n, heads, width)),
        b2=-0.3 * out.sum(-1),  # the mean of gelu over normal numbers
        threshold=0.5,
        window=window,
    )


def zap(s, **options):
    """A KVzap of random weights for the attention inputs of tests' streams."""
    n, heads = s.spec.layers, s.spec.kv_heads
    hidden = heads * s.spec.head_dim
    rng = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(*shape, generator=rng) / shape[-1] ** 0.5  # noqa: E731
    return KVzap(
        w1=2 * draw(n, 5, hidden), b1=draw(n, 5), w2=draw(n, heads, 5), b2=draw(n, heads) / 4,
        **{"threshold": 0.0, "window": None} | options,
    )  # fmt: skip


def trim(s, **options):
    """TRIM-KV with random gates on the attention inputs of tests' streams."""
    n, heads = s.spec.layers, s.spec.kv_heads
    hidden = heads * s.spec.head_dim
    rng = torch.Generator().manual_seed(17)
    draw = lambda *shape: torch.randn(*shape, generator=rng) / shape[-1] ** 0.5  # noqa: E731
    return TrimKV(
        w1=2 * draw(n, 6, hidden), b1=draw(n, 6), w2=3 * draw(n, heads, 6), b2=2 + draw(n, heads),
        budget=s.kept, **options,
    )  # fmt: skip


def fast(s, **options):
    """A gate of Fast KVzip with random weights, likewise."""
    n, heads, group, dim = s.spec.layers, s.spec.kv_heads, s.spec.group, 4
    hidden = heads * s.spec.head_dim
    rng = torch.Generator().manual_seed(23)
    draw = lambda *shape: torch.randn(*shape, generator=rng) / shape[-1] ** 0.5  # noqa: E731
    return FastKVzip(
        q=draw(n, heads * group * dim, hidden), q_bias=draw(n, heads * group * dim),
        k=draw(n, heads * dim, hidden), q_norm=1 + draw(n, dim) / 8, k_norm=1 + draw(n, dim) / 8,
        base=draw(n, heads, 1, 3, dim), bias=draw(n, heads, 1, group), budget=s.kept, **options,
    )  # fmt: skip


def duo(sizes):
    """Every other head streams."""
    full = [
        [(x + h) % 2 == 1 for h in range(sizes.spec.kv_heads)] for x in range(sizes.spec.layers)
    ]
    return DuoAttention(full_heads=full, sinks=sizes.room, window=sizes.window)


def local(s):
    return LocalAttention(window=s.window, sinks=s.room)


def ada_ea(s):
    """Admits more than half of the tokens."""
    heads = s.spec.layers, s.spec.kv_heads, s.spec.group
    rng, dim = torch.Generator().manual_seed(5), s.spec.head_dim
    q = torch.randn(*heads, dim, dim, generator=rng)
    mean, covariance = torch.randn(*heads, dim, generator=rng), q @ q.mT / dim
    near = 0.55 + 0.9 / s.spec.group**0.5
    return AdaEA(
        mean=mean, covariance=covariance, thresholds=torch.full(heads, near), sinks=1,
        window=s.window,
    )  # fmt: skip


ADMISSIONS = {
    "all": lambda s: AdmitAll(),
    "random": lambda s: RandomGate(sparsity=0.35, seed=3),
    "local": local,
    "duo": duo,
    "gate": gate,
    "zap": lambda s: zap(s, threshold=-0.4),
    "any_of": lambda s: any_of(RandomGate(sparsity=0.5), local(s)),
    "all_of": lambda s: all_of(
        RandomGate(sparsity=0.1), gate(s, seed=1), RandomGate(sparsity=0.2, seed=9)
    ),
    "ada_ea": ada_ea,
    "per_layer": lambda s: per_layer(RandomGate(sparsity=0.3), {0: AdmitAll()}),
}


def quest(s, pages=1, **options):
    return Quest(budget=s.window + 1 + (pages - 1) * s.spec.page_size, **options)


def xattention(**options):
    return XAttention(threshold=0.5, stride=2, tile=4, **options)


SELECTIONS = {
    "all": lambda s: SelectAll(),
    "quest": quest,
    "quest_mean": lambda s: quest(s, 2, group="mean", last="partial"),
    "quest_each": lambda s: quest(s, 2, group="each", last=0),
    "quest_first": lambda s: quest(s, 2, group="max", first=1, last=1),
    "top_channels": lambda s: TopChannels(budget=s.window + 1, channels=3),
    "user": lambda s: LargestKey(budget=Tokens(s.window + 1), group="each"),
    "per_layer": lambda s: per_layer(quest(s, 1, last=0), {0: SelectAll()}),
    "xattention": lambda s: xattention(),
    "xattention_quest": lambda s: PerPhase(prefill=xattention(), decode=quest(s)),
    "xattention_layers": lambda s: per_layer(
        PerPhase(prefill=xattention(), decode=quest(s, 2)), {0: quest(s)}
    ),
}
# Those that a prompt's last queries decide, which take it in one call.
WHOLE = {
    "flex": lambda s: FlexPrefill(gamma=0.4, tau=0.3, min_budget=4, tile=4),
    "slash": lambda s: VerticalSlash(vertical=4, slash=2, queries=5, first=1, nearest=1, tile=4),
    "slash_quest": lambda s: PerPhase(
        prefill=VerticalSlash(vertical=3, slash=1, queries=3, first=1, nearest=1, tile=2),
        decode=quest(s),
    ),
}


def snap(budget, **options):
    return SnapKV(budget=budget, observation=3, kernel=3, **options)


def worth(s):
    """How much each head is worth, from 1 to 4."""
    return [[1 + (5 * n + 3 * h) % 4 for h in range(s.spec.kv_heads)] for n in range(s.spec.layers)]


def parts(s):
    """Parts of heads that are the budget's on average, within a half of it."""
    mean = s.kept / s.length
    return [[min(mean * (0.5 + x / 4), 1) for x in row] for row in worth(s)]


def pyramid(s):
    return Pyramid(Tokens(s.kept + 1), beta=4.0, observation=s.window + 1)


def cap(s):
    managed = sum(s.spec.slides(x) is None for x in range(s.spec.layers))
    return TotalCap(managed * s.spec.kv_heads * (2 * s.spec.page_size + 2), drop=0.2)


def filters(s):
    n, heads, dim = s.spec.layers, s.spec.kv_heads, s.spec.head_dim
    return torch.randn(n, heads, dim, generator=torch.Generator().manual_seed(7))


def tri(s, **options):
    """Statistics of random queries."""
    shape = s.spec.layers, s.spec.heads, s.spec.head_dim // 2
    rng = torch.Generator().manual_seed(11)
    real, imaginary, more = (torch.randn(*shape, generator=rng) for _ in range(3))
    size = torch.hypot(real, imaginary) + more.abs()
    return TriAttention(budget=s.kept, real=real, imaginary=imaginary, size=size, **options)


EVICTIONS = {
    "none": lambda s: KeepAll(),
    "tokens": lambda s: snap(s.kept),
    "tokens_decode": lambda s: snap(s.kept, when="decode", group="max", pooling="max"),
    "ratio": lambda s: snap(Ratio((s.kept + 0.5) / s.length), normalize="global", group="max"),
    "adaptive": lambda s: snap(Adaptive(Tokens(s.kept)), when="decode"),
    "pyramid": lambda s: snap(pyramid(s)),
    "adaptive_pyramid": lambda s: snap(Adaptive(pyramid(s), floor=0.5)),
    "across_layers": lambda s: snap(AcrossLayers(Tokens(s.kept)), when="decode"),
    "lazy_layers": lambda s: snap(LazyLayers(Tokens(s.kept), threshold=0.3, held=2)),
    "lukv": lambda s: snap(LUKV(parts(s))),
    "headkv": lambda s: snap(HeadKV(Tokens(s.kept), importance=worth(s), beta=1.2)),
    "cap": lambda s: snap(cap(s), normalize="global"),
    "cap_decode": lambda s: snap(cap(s), when="decode"),
    "sage": lambda s: SageKV(budget=s.kept, sinks=3),
    "dbudget": lambda s: DBudgetKV(threshold=0.2, sinks=2, observation=3),
    "fastgen": lambda s: FastGen(recovery=0.5, sinks=s.room - 3, observation=3, when="decode"),
    "simlayer": lambda s: SimLayerKV(
        threshold=0.05, sinks=s.room - 3, recent=s.window, observation=2
    ),
    "at_end_zap": lambda s: AtPromptEnd(zap(s, threshold=0.4), generated="keep"),
    "at_end": lambda s: AtPromptEnd(RandomGate(sparsity=0.3, seed=5)),
    "at_end_gate": lambda s: AtPromptEnd(gate(s, seed=2), generated="keep"),
    "at_end_local": lambda s: AtPromptEnd(LocalAttention(window=s.window, sinks=s.room - 2)),
    "h2o": lambda s: H2O(budget=s.kept, when="prompt_end", group="max"),
    "h2o_decode": lambda s: H2O(budget=s.kept),
    "streaming": lambda s: StreamingLLM(budget=s.kept, sinks=3),
    "tova": lambda s: TOVA(budget=s.kept),
    "tova_layer": lambda s: TOVA(budget=s.kept, across_heads=True, when="prompt_end"),
    "keydiff": lambda s: KeyDiff(budget=s.kept, when="decode"),
    "knorm": lambda s: Knorm(budget=s.kept),
    "lagkv": lambda s: LagKV(budget=s.kept, lag=s.spec.page_size + 1, sinks=2),
    "q_filters": lambda s: QFilters(budget=s.kept, filters=filters(s), when="decode"),
    "expected": lambda s: ExpectedAttention(budget=s.kept, sinks=2, future=9),
    "cap_kv": lambda s: CapKV(budget=s.kept, sinks=2, future=9, tau=2.0),
    "expected_decode": lambda s: ExpectedAttention(budget=s.kept, when="decode", value_norm=False),
    "critical": lambda s: CriticalKV(snap(s.kept)),
    "critical_expected": lambda s: CriticalKV(
        ExpectedAttention(budget=Adaptive(Tokens(s.kept)), covariance=False, when="decode"),
        first=0.4,
    ),
    "r_kv": lambda s: RKV(budget=s.kept, observation=3, kernel=3),
    "tri": lambda s: tri(s, keep_prompt=True),
    "tri_end": lambda s: tri(s, when="prompt_end", normalize=False, group="mean"),
    "g_kv": lambda s: GKV(budget=s.kept, observation=3),
    "trim": trim,
    "fast": lambda s: fast(s, sinks=1),
    "ranked": lambda s: Ranked(gate=zap(s), budget=s.kept, when="decode"),
    "judge": lambda s: JudgeQ(budget=s.kept, embeds=torch.ones(2, 3)),
    "kvzip": lambda s: KVzip(budget=s.kept, sinks=2),
    "per_layer": lambda s: per_layer(snap(s.kept), {0: AtPromptEnd(RandomGate(sparsity=0.2))}),
    "per_layer_decode": lambda s: per_layer(snap(s.kept, when="decode"), {0: snap(s.kept)}),
    "per_layer_mixed": lambda s: per_layer(
        snap(s.kept, when="decode"), {0: AtPromptEnd(RandomGate(sparsity=0.2))}
    ),
}


def build(sizes, admission="all", selection="all", eviction="none", backend="auto"):
    """The pipeline of three named policies."""
    return CachePipeline(
        admission=ADMISSIONS[admission](sizes),
        selection=(SELECTIONS | WHOLE)[selection](sizes),
        eviction=EVICTIONS[eviction](sizes),
        window=sizes.window,
        backend=backend,
    )


NAMES = (sorted(ADMISSIONS), sorted(SELECTIONS), sorted(EVICTIONS))
# Scores of SnapKV are sums of exponentials: in float64 the order of summation decides nothing.
EXACT = (torch.float64,)
SMALL = (1, 2, 4, 8)
seeds = st.integers(0, 2**16)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@st.composite
def caches(draw, dtypes=DTYPES, page_sizes=(1, 2, 4, 8, 16, 32), sliding=True):
    """Sizes of caches, with windows around the rollback depth and off the powers of two."""
    kv_heads = draw(st.integers(1, 3))
    layers = draw(st.integers(2, 3))
    rollback = draw(st.sampled_from([0, 1, 4, 9]))
    window = draw(st.sampled_from([1, 2, 3, 7, 8, 13, 20]) | st.just(rollback + 1))
    slides = draw(st.sampled_from([None, 1, 5, window + 3])) if sliding else None
    spec = CacheSpec(
        layers=layers + (slides is not None),
        heads=kv_heads * draw(st.sampled_from([1, 3, 4, 5, 7, 8])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 12, 16, 24, 33, 40, 64])),
        page_size=draw(st.sampled_from(page_sizes)),
        rollback=rollback,
        interval=draw(st.sampled_from([1, 3, 8])),
        dtype=draw(st.sampled_from(dtypes)),
        sliding=() if slides is None else (*[None] * layers, slides),
    )
    return Sizes(spec, window)
