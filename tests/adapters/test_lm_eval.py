"""The model "kvpolicy" of lm-evaluation-harness beside its own for transformers."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvpolicy import CachePipeline, RandomGate, SnapKV, UnsupportedError, save_pipeline
from tests.support.adapters.models import SIZES, pipelines, tiny

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it brings

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from kvpolicy.adapters.hf import attach  # noqa: E402
from kvpolicy.adapters.lm_eval import KVPolicyLM  # noqa: E402

WORDS = 197
NAMES = ["gate", "quest", "snapkv", "gate-quest-snapkv", "all"]


@pytest.fixture(scope="module")
def tokenizer():
    """A word is a token."""
    words = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(WORDS))]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<pad>",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def text(length, seed):
    rng = torch.Generator().manual_seed(seed)
    return " ".join(f"w{n}" for n in torch.randint(0, WORDS, (length,), generator=rng).tolist())


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=n)
        for n, given in enumerate(arguments)
    ]


CONTEXTS = [text(n, n) for n in (40, 29, 33)]
CONTINUED = requests(
    "loglikelihood",
    [(context, " " + text(n, 7 * n)) for context in CONTEXTS for n in (1, 2, 6)]
    + [(CONTEXTS[0], " w3"), ("", text(25, 3)), (text(9, 9) + " ", text(2, 2))],
)
GENERATED = requests(
    "generate_until",
    [(context, {"until": ["w5 "], "max_gen_toks": n}) for context in CONTEXTS for n in (4, 6)],
)
ROLLED = requests("loglikelihood_rolling", [(text(n, n + 1),) for n in (3, 30, 44)])


def ours(model, tokenizer, pipeline, **options):
    return KVPolicyLM(model, pipeline, tokenizer=tokenizer, **{**SIZES, **options})


def model():
    return tiny(eos=2)


def scores(answers):
    return torch.tensor([score for score, _ in answers], dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_a_neutral_pipeline_is_the_plain_model(tokenizer, size):
    """Each score within twice plain's own error, and what it chooses and writes the same."""
    plain = HFLM(model(), tokenizer=tokenizer, batch_size=3)
    exact = HFLM(model().double(), tokenizer=tokenizer, batch_size=3)
    lm = ours(model(), tokenizer, CachePipeline(window=5), batch_size=size, max_batch_size=4)
    for kind, asked in (("loglikelihood", CONTINUED), ("loglikelihood_rolling", ROLLED)):
        found, wanted, true = (getattr(x, kind)(asked) for x in (lm, plain, exact))
        if kind == "loglikelihood":
            assert [best for _, best in found] == [best for _, best in wanted]
            found, wanted, true = map(scores, (found, wanted, true))
        found, wanted, true = (torch.as_tensor(x).double() for x in (found, wanted, true))
        error = (found - true).abs().max()
        assert error <= 2 * (wanted - true).abs().max() < 1e-3
    assert lm.generate_until(GENERATED) == plain.generate_until(GENERATED)


def test_lm_evals_own_model_on_an_attached_one(tokenizer):
    """Forwards of a neutral pipeline that are not cut are transformers' own to the bit."""
    served = model()
    lm = HFLM(served, tokenizer=tokenizer, batch_size=3)
    plain = lm.loglikelihood(CONTINUED), lm.loglikelihood_rolling(ROLLED)
    with attach(served, CachePipeline(window=5)):
        assert (lm.loglikelihood(CONTINUED), lm.loglikelihood_rolling(ROLLED)) == plain
        assert lm.generate_until(GENERATED)
    with attach(served, pipelines()["striped"]):
        assert lm.loglikelihood(CONTINUED) != plain[0]


@pytest.fixture(scope="module")
def plainly(tokenizer):
    """What the plain model answers."""
    plain = HFLM(model(), tokenizer=tokenizer, batch_size=8)
    asked = {
        "loglikelihood": CONTINUED,
        "generate_until": GENERATED,
        "loglikelihood_rolling": ROLLED,
    }
    return {kind: getattr(plain, kind)(requests) for kind, requests in asked.items()}


@pytest.mark.parametrize("name", NAMES)
def test_policies_act(tokenizer, plainly, name):
    """In every kind of task, in a batch as alone."""
    pipeline = pipelines()[name]
    one, many = (ours(model(), tokenizer, pipeline, batch_size=n) for n in (1, 4))
    found = scores(many.loglikelihood(CONTINUED))
    assert torch.allclose(found, scores(one.loglikelihood(CONTINUED)), atol=1e-3)
    assert (found - scores(plainly["loglikelihood"])).abs().max() > 1e-1
    written = many.generate_until(GENERATED)
    assert written == one.generate_until(GENERATED)
    slots = ours(model(), tokenizer, pipeline, batch_size=1, many=2)
    assert written == slots.generate_until(GENERATED)
    mine, theirs = (x.measured["generate_until"].record() for x in (slots, one))
    assert mine["tokens"] == theirs["tokens"] and slots.batch_size == 1
    assert mine["kept_fraction"] == pytest.approx(theirs["kept_fraction"])
    assert written != plainly["generate_until"]
    if pipeline.eviction.neutral or pipeline.eviction.when == "decode":
        found = torch.tensor(many.loglikelihood_rolling(ROLLED))
        assert torch.allclose(found, torch.tensor(one.loglikelihood_rolling(ROLLED)), atol=1e-3)
        assert (found - torch.tensor(plainly["loglikelihood_rolling"])).abs().max() > 1e-1
    else:
        with pytest.raises(UnsupportedError, match="^loglikelihood_rolling: .* SnapKV"):
            many.loglikelihood_rolling(ROLLED)


def test_scores_are_the_attachment_s(tokenizer):
    """The prompt ends before the context's last token."""
    lm = ours(model(), tokenizer, pipelines()["gate-quest-snapkv"])
    context, more = CONTEXTS[0], CONTINUED[1].args[1]
    wanted = lm.attached.loglikelihood(
        torch.tensor([lm.tok_encode(context)]), torch.tensor([lm.tok_encode(more)])
    )
    (found, _), = lm.loglikelihood(CONTINUED[1:2])  # fmt: skip
    assert abs(found - float(wanted.sum())) < 1e-4


def test_bytes_are_those_of_the_contexts_caches(tokenizer):
    lm = ours(model(), tokenizer, pipelines()["snapkv"], batch_size=2)
    lm.loglikelihood(CONTINUED[::3][:3])
    expected, contexts = 0, sorted(CONTEXTS, key=len)[::-1]
    for part in (contexts[:2], contexts[2:]):
        ids, mask = lm.tok_batch_encode(part)
        found = lm.attached.read(ids[:, :-1], mask[:, :-1]).report()
        expected += found.total - found.reserved
    assert lm.get_model_info()["kvpolicy"]["measured"]["loglikelihood"]["bytes"] == expected / 3


def test_long_contexts_are_cut_as_hflm_cuts_them(tokenizer):
    plain = HFLM(model(), tokenizer=tokenizer, max_length=24)
    lm = ours(model(), tokenizer, CachePipeline(window=5), max_length=24)
    fits = [x for x in CONTINUED if x.args[0]]
    found, wanted = (scores(x.loglikelihood(fits)) for x in (lm, plain))
    assert torch.allclose(found, wanted, atol=1e-3)
    with pytest.raises(ValueError, match="continuation: wanted at most max_length=24 tokens"):
        lm.loglikelihood([x for x in CONTINUED if not x.args[0]])
    found, wanted = (torch.tensor(x.loglikelihood_rolling(ROLLED)) for x in (lm, plain))
    assert torch.allclose(found, wanted, atol=1e-3)


def test_mixed_precision_and_the_softmax_s_dtype(tokenizer):
    options = {"mixed_precision_dtype": "bfloat16", "softmax_dtype": "float32"}
    plain = HFLM(model(), tokenizer=tokenizer, **options)
    lm = ours(model(), tokenizer, CachePipeline(window=5), **options)
    found, wanted = (scores(x.loglikelihood(CONTINUED)) for x in (lm, plain))
    full = scores(HFLM(model(), tokenizer=tokenizer).loglikelihood(CONTINUED))
    assert (found - full).abs().max() > 1e-3  # it took effect
    assert (found - full).abs().max() < 3 * (wanted - full).abs().max()


@pytest.mark.parametrize("options", [{}, {"page_size": 2}])
def test_answers_are_kept_by_pipeline(tokenizer, tmp_path, options):
    """One file for many pipelines and sizes, and for the plain model."""
    file = str(tmp_path / "answers.db")
    first = CachePipeline(admission=RandomGate(sparsity=0.5), window=5)
    other = CachePipeline(admission=RandomGate(sparsity=0.5, seed=1), window=5)
    found = {}
    for name, lm in {
        "plain": HFLM(model(), tokenizer=tokenizer),
        "first": ours(model(), tokenizer, first),
        "other": ours(model(), tokenizer, first if options else other, **options),
    }.items():
        found[name] = CachingLM(lm, file).loglikelihood(CONTINUED)
        assert getattr(lm, "measured", True), name
    again = ours(model(), tokenizer, first)
    assert CachingLM(again, file).loglikelihood(CONTINUED) == found["first"]
    assert again.measured == {}, "it was asked again"
    if not options:
        assert found["plain"] != found["first"] != found["other"] != found["plain"]


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/facts.jsonl"}}, cache_dir: "{folder}/cache"}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: {target}
"""
KINDS = {
    "choosing": ("multiple_choice", "answer\ndoc_to_choice: choices"),
    "writing": ("generate_until", "answer\ngeneration_kwargs: {until: [w5], max_gen_toks: 5}"),
    "rolling": ("loglikelihood_rolling", "context"),
}


def test_a_whole_evaluation(tokenizer, tmp_path):
    """By the model's name and a pipeline's file; the results hold what caches took."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [
        {"context": text(30 + n, n), "choices": [f"w{n}", f"w{n + 1} w{n}"], "answer": n % 2}
        for n in range(6)
    ]
    (tasks / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (kind, target) in KINDS.items():
        config = TASK.format(name=name, folder=tasks, kind=kind, target=target)
        (tasks / f"{name}.yaml").write_text(config)
    model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    save_pipeline(CachePipeline(window=5), tmp_path / "neutral.json")
    save_pipeline(CachePipeline(eviction=SnapKV(budget=14, observation=4, when="decode")),
                  tmp_path / "snapkv.yaml")  # fmt: skip
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def run(model, **arguments):
        return lm_eval.simple_evaluate(
            model=model, tasks=list(KINDS), task_manager=manager, bootstrap_iters=0,
            batch_size=2, device="cpu",
            model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32", **arguments},
        )  # fmt: skip

    assert get_model("kvpolicy") is KVPolicyLM
    plain = run("hf")
    neutral = run("kvpolicy", pipeline=str(tmp_path / "neutral.json"))
    small = run("kvpolicy", pipeline=str(tmp_path / "snapkv.yaml"), **SIZES)
    for name in ("choosing", "writing"):
        assert plain["results"][name] == neutral["results"][name]
    for result in (neutral, small):
        json.dumps(result["config"]["kvpolicy"])
        measured = result["config"]["kvpolicy"]["measured"]
        assert set(measured) == {"loglikelihood", "generate_until", "loglikelihood_rolling"}
    kept = small["config"]["kvpolicy"]["measured"]["loglikelihood"]
    assert kept["sequences"] == 6 and kept["tokens"] == sum(range(30, 36)) / 6 - 1
    assert kept["kept_fraction"] == pytest.approx(14 * 6 / (sum(range(30, 36)) - 6))
    full = neutral["config"]["kvpolicy"]["measured"]["loglikelihood"]
    assert full["kept_fraction"] == 1
    assert full["full_attention_bytes"] == full["tokens"] * 2 * 2 * 2 * 16 * 4
    assert small["config"]["kvpolicy"]["sizes"] == SIZES


def test_the_command_has_the_model(monkeypatch, capsys):
    """As `python -m` runs it: lm-eval's own command line, which finds the model."""
    import runpy

    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("kvpolicy.adapters.lm_eval", run_name="__main__")
    assert left.value.code == 0 and "--model_args" in capsys.readouterr().out


def test_what_is_refused(tokenizer, tmp_path):
    with pytest.raises(TypeError, match="pipeline"):
        KVPolicyLM(model(), tokenizer=tokenizer)
    with pytest.raises(FileNotFoundError):
        ours(model(), tokenizer, str(tmp_path / "none.json"))
    (tmp_path / "code.json").write_text('{"admission": {"type": "os:system"}}')
    with pytest.raises(ValueError, match="trust_code=True"):
        ours(model(), tokenizer, str(tmp_path / "code.json"))
    with pytest.raises(ValueError, match="page_size"):
        ours(model(), tokenizer, CachePipeline(), page_size=0)
