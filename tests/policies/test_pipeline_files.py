"""Pipelines as files: equal after the way to a file and back, and nothing in a file runs."""

from __future__ import annotations

import json
import sys

import attrs
import pytest
import torch

from kvpolicy import (
    Adaptive,
    AtPromptEnd,
    Budget,
    CachePipeline,
    CacheSpec,
    DuoAttention,
    KVPress,
    LocalAttention,
    Pyramid,
    Quest,
    Ratio,
    SnapKV,
    Tokens,
    TotalCap,
    WriteGate,
    any_of,
    load_pipeline,
    per_layer,
    save_pipeline,
)
from kvpolicy.admission import _duo_file
from kvpolicy.admission._files import source_of
from kvpolicy.admission._packed import pack_file
from kvpolicy.budget._wrapper import Scaled
from kvpolicy.pipeline_files import data_of, pipeline_from
from kvpolicy.pipeline_files.names import KNOWN, is_policy
from kvpolicy.pipeline_files.weights import weights_of
from kvpolicy.pretrained import path as shipped
from kvpolicy.store.fingerprint import pipeline_fingerprint
from tests.support.contract.cases import (
    ADMISSIONS,
    EVICTIONS,
    SELECTIONS,
    WHOLE,
    Sizes,
    build,
    gate,
)

SIZES = Sizes(CacheSpec(layers=3, heads=4, kv_heads=2, head_dim=8, page_size=4), window=8)
NAMES = {"admission": ADMISSIONS, "selection": SELECTIONS | WHOLE, "eviction": EVICTIONS}
CASES = [{slot: name} for slot, table in NAMES.items() for name in table]


def on_disk(value, folder):
    """`value` with the weights of every policy inside it in a file below `folder`."""
    if weights_of(value):
        file = folder / "weights" / f"{len(list(folder.rglob('*.safetensors')))}.safetensors"
        file.parent.mkdir(exist_ok=True)
        value.save(file)
        return attrs.evolve(value, source=source_of(file, file, None, None))
    if isinstance(value, tuple):
        return tuple(on_disk(item, folder) for item in value)
    if not attrs.has(type(value)):
        return value
    changed = {
        field.name: on_disk(found, folder)
        for field in attrs.fields(type(value))
        if not field.name.startswith("_") and (found := getattr(value, field.name)) is not None
    }
    return attrs.evolve(value, **changed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(*case.items()))
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_the_way_to_a_file_and_back(tmp_path, case, suffix):
    """Wherever its folder lies then."""
    (folder := tmp_path / "made").mkdir()
    pipeline = on_disk(build(SIZES, **case), folder)
    save_pipeline(pipeline, folder / f"pipeline.{suffix}")
    file = folder.rename(tmp_path / "moved") / f"pipeline.{suffix}"
    again = load_pipeline(file, trust_code=case.get("selection") == "user")
    assert pipeline_fingerprint(again) == pipeline_fingerprint(pipeline)
    assert again.init(SIZES.spec).batch == 1


def test_a_press_of_another_library_has_no_place_in_a_file(tmp_path):
    class Press:
        compression_ratio = 0.5

        def score(self, *given):
            raise NotImplementedError

    pipeline = CachePipeline(eviction=KVPress(press=Press(), budget=Ratio(0.5)), window=1)
    with pytest.raises(ValueError, match=r"eviction\.press: wanted numbers, texts"):
        save_pipeline(pipeline, tmp_path / "pipeline.json")
    assert not list(tmp_path.iterdir())


def test_every_class_of_the_library_stands_in_a_case():
    """So that the test above walks over all of them."""
    seen = set()

    def look(value):
        if attrs.has(type(value)):
            seen.add(type(value))
            for field in attrs.fields(type(value)):
                look(getattr(value, field.name))
        elif isinstance(value, tuple):
            for item in value:
                look(item)

    for case in CASES:
        look(build(SIZES, **case))
    assert set(KNOWN.values()) - seen == {Scaled, KVPress}


@pytest.mark.parametrize(
    "budget",
    [
        Scaled(TotalCap(1000, drop=0.3), factor=0.7),
        Adaptive(Pyramid(Ratio(0.4), beta=3.5, observation=7), floor=1 / 3, form="blend"),
        Tokens((1 << 30) - 1),
    ],
)
def test_budgets_and_numbers(tmp_path, budget):
    """To the last bit."""
    pipeline = CachePipeline(
        eviction=per_layer(
            SnapKV(budget=999), {range(6, 0, -2): SnapKV(budget=64), 9: SnapKV(budget=65)}
        )
        if isinstance(budget, Tokens)
        else SnapKV(budget=budget)
    )
    for file in (tmp_path / "p.json", tmp_path / "p.yml"):
        save_pipeline(pipeline, file)
        assert load_pipeline(file) == pipeline


def test_layers_are_spans(tmp_path):
    policy = per_layer(LocalAttention(window=8), {0: any_of(LocalAttention(window=8)), range(2, 7): LocalAttention(window=8, sinks=0), range(20, 10, -3): LocalAttention(window=8, sinks=1)})  # fmt: skip  # noqa: E501
    data = data_of(CachePipeline(admission=policy))
    assert list(data["admission"]["layers"]) == ["0", "2:7", "20:10:-3"]
    assert pipeline_from(data).admission == policy


def test_what_a_person_writes(tmp_path):
    """Defaults may be left out, and numbers stand for budgets as in Python."""
    (tmp_path / "short.yaml").write_text(
        "selection: {type: Quest, budget: 1024}\n"
        "eviction:\n  type: SnapKV\n  budget: {type: Adaptive, base: 4096}\n"
    )
    wanted = CachePipeline(
        selection=Quest(budget=1024), eviction=SnapKV(budget=Adaptive(Tokens(4096)))
    )
    assert load_pipeline(tmp_path / "short.yaml") == wanted
    assert pipeline_from({}) == CachePipeline()


def test_shipped_weights_are_named(tmp_path):
    policy = WriteGate.from_pretrained(shipped("smollm2-135m-instruct-w64-keep25"), threshold=0.3)
    data = data_of(CachePipeline(admission=policy))["admission"]
    assert data["pretrained"] == "smollm2-135m-instruct-w64-keep25" and "file" not in data
    by_name = WriteGate.from_pretrained(data["pretrained"], threshold=0.3)
    assert data_of(CachePipeline(admission=by_name))["admission"] == data
    again = pipeline_from({"admission": data}).admission
    assert again.threshold == 0.3 and again.window == 64 and torch.equal(again.w1, policy.w1)
    few = {name: data[name] for name in ("type", "pretrained", "sha256")}
    assert pipeline_from({"admission": few}).admission.threshold == 0.1
    with pytest.raises(
        ValueError, match=f'sha256: wanted "{data["sha256"]}", which is that of the weights'
    ):
        pipeline_from({"admission": few | {"sha256": "0" * 64}})


def test_a_packed_copy_fits(tmp_path, monkeypatch):
    """As a wheel may hold it: other bytes, the same weights."""
    policy = WriteGate.from_pretrained(shipped("smollm2-135m-instruct-w64-keep25"))
    data = data_of(CachePipeline(admission=policy))
    pack_file(policy.source.path, tmp_path / "smollm2-135m-instruct-w64-keep25.packed.safetensors")
    monkeypatch.setenv("KVPOLICY_PRETRAINED", str(tmp_path))
    again = pipeline_from(data)
    assert again.admission.source.path.parent == tmp_path
    assert pipeline_fingerprint(again) == pipeline_fingerprint(CachePipeline(admission=policy))
    assert data_of(again) == data


def test_a_pattern_is_named_by_its_folder(tmp_path):
    """As long as it is the one that its values gave; else its rows stand there."""
    values, sizes = [[0.1, 0.9], [0.8, 0.2]], {"sink_size": 4, "recent_size": 8}
    _duo_file.write(tmp_path / "duo", values, sizes)
    for options in ({"sparsity": 0.5}, {"threshold": 0.15, "sinks": 2, "seed": 7}):
        policy = DuoAttention.from_pretrained(tmp_path / "duo", **options)
        pipeline = CachePipeline(eviction=AtPromptEnd(policy))
        save_pipeline(pipeline, tmp_path / "p.json")
        data = json.loads((tmp_path / "p.json").read_text())["eviction"]["admission"]
        assert data["folder"] == "duo" and "full_heads" not in data
        assert load_pipeline(tmp_path / "p.json") == pipeline
    other = attrs.evolve(policy, full_heads=[[True, False], [True, True]])
    data = data_of(CachePipeline(admission=other))
    assert data["admission"]["full_heads"] == [[True, False], [True, True]]
    assert pipeline_from(data).admission == other
    _duo_file.write(tmp_path / "duo", [[0.2, 0.9], [0.8, 0.2]], sizes)
    with pytest.raises(ValueError, match=r"p.json: eviction.admission: sha256: wanted"):
        load_pipeline(tmp_path / "p.json")


def test_weights_are_those_of_their_file(tmp_path):
    made = gate(SIZES)
    with pytest.raises(ValueError, match=r"^admission: source: .* come from no file; write them"):
        data_of(CachePipeline(admission=made))
    made.save(tmp_path / "gate.safetensors")
    read = WriteGate.from_pretrained(tmp_path / "gate.safetensors")
    pipeline = CachePipeline(admission=read)
    save_pipeline(pipeline, tmp_path / "p.json")
    (tmp_path / "deep").mkdir()
    save_pipeline(pipeline, tmp_path / "deep" / "p.json")
    text = (tmp_path / "deep" / "p.json").read_text()
    assert json.loads(text)["admission"]["file"] == str(tmp_path / "gate.safetensors")
    changed = attrs.evolve(read, b2=read.b2 + 1)
    with pytest.raises(ValueError, match="no longer those of .*gate.safetensors"):
        data_of(CachePipeline(admission=changed))
    attrs.evolve(read, b2=read.b2 + 1).save(tmp_path / "gate.safetensors")
    with pytest.raises(ValueError, match="p.json: admission: sha256: wanted"):
        load_pipeline(tmp_path / "p.json")
    (tmp_path / "gate.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="p.json: admission: .*no file .*gate.safetensors"):
        load_pipeline(tmp_path / "p.json")


def test_a_source_changes_nothing(tmp_path):
    made = gate(SIZES)
    made.save(tmp_path / "gate.safetensors")
    read = attrs.evolve(WriteGate.from_pretrained(tmp_path / "gate.safetensors"), window=None)
    assert read.source.path == tmp_path / "gate.safetensors" and "source" not in repr(read)
    one, other = CachePipeline(admission=read), CachePipeline(admission=made)
    assert pipeline_fingerprint(one) == pipeline_fingerprint(other)
    placed = read.place(torch.device("cpu"), torch.float64, "reference")
    assert placed.source == read.source


TOUCH = """
import attrs, pathlib
from kvpolicy import Budget, LocalAttention
pathlib.Path({path!r}).write_text("ran")
@attrs.frozen
class Root(Budget):
    factor: float = 4.0
    def tokens_per_head(self, seen, layer, layers):
        return round(self.factor * seen ** 0.5)
def make(**fields):
    return Root(**fields)
root = Root()
"""


def test_code_is_trusted_or_not_imported(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "mine_for_files.py").write_text(TOUCH.format(path=str(ran)))
    monkeypatch.syspath_prepend(tmp_path)
    data = {"eviction": {"type": "SnapKV", "budget": {"type": "mine_for_files:Root"}}}
    with pytest.raises(ValueError, match=r"eviction.budget: type: .*trust_code=True.*--trust-code"):
        pipeline_from(data)
    assert not ran.exists() and "mine_for_files" not in sys.modules
    pipeline = pipeline_from(data, trust_code=True)
    assert ran.read_text() == "ran" and isinstance(pipeline.eviction.budget, Budget)
    assert data_of(pipeline)["eviction"]["budget"] == {"type": "mine_for_files:Root", "factor": 4.0}


@pytest.mark.parametrize(
    "name",
    [
        "os:system", "builtins:eval", "subprocess:Popen", "kvpolicy:Budget", "kvpolicy:attach",
        "kvpolicy:CachePipeline", "kvpolicy:CacheSpec", "mine_for_files:make",
        "mine_for_files:root",
    ],
)  # fmt: skip
def test_trust_is_for_policies_and_budgets(tmp_path, monkeypatch, name):
    """Functions, instances, bases and other classes are none, trusted or not."""
    (tmp_path / "mine_for_files.py").write_text(TOUCH.format(path=str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TypeError, match="wanted a class of policies, budgets or combinators, got"):
        pipeline_from({"admission": {"type": name, "command": "true"}}, trust_code=True)


WRONG = [
    ({"eviction": {"type": "SnapKV"}}, "eviction.budget: SnapKV has no default for it"),
    ({"selection": {"type": "Quest", "budgte": 9}}, 'selection.budgte: .* write "budget"'),
    ({"selection": {"type": "Qest", "budget": 9}}, 'selection: type: .* write "Quest"'),
    ({"selection": {"type": "Quest", "budget": "9"}}, "selection: budget: wanted .*got '9'"),
    ({"selection": {"type": "SnapKV", "budget": 9}}, "selection: wanted a selection"),
    ({"selection": {"type": ["Quest"]}}, "selection: type: wanted the name"),
    ({"selection": 3}, "selection: wanted a selection"),
    ({"eviction": {"budget": 9}}, r'eviction: .*, got {.budget.: 9}; write {"type": ..., ...}$'),
    ({"selecton": {}}, 'selecton: wanted .* write "selection"'),
    ({"format": 2}, "format: wanted 1, got 2"),
    ([1], "pipeline: wanted names and values"),
    ({"eviction": {"type": "SnapKV", "budget": {"type": "Ratio", "ratio": 2}}},
     "eviction.budget: ratio: wanted"),
    ({"admission": {"type": "WriteGate"}}, "admission: file: wanted one of .* never given"),
    ({"admission": {"type": "WriteGate", "file": 3}}, "admission: file: wanted a text"),
    ({"admission": {"type": "WriteGate", "w1": [1.0]}}, "admission: file: wanted one of"),
    ({"admission": {"type": "WriteGate", "file": "a", "pretrained": "b"}}, "got pretrained and"),
    ({"admission": {"type": "per_layer", "default": {"type": "AdmitAll"}, "layers": {"a": {}}}},
     "admission.layers: wanted \"3\", \"0:8\" or"),
    ({"admission": {"type": "per_layer", "default": {"type": "AdmitAll"},
                    "layers": {"0:99999999999": {"type": "AdmitAll"}}}}, "wanted layers below"),
    ({"admission": {"type": "any_of", "policies": []}}, "admission: policies: wanted at least one"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "says"), WRONG)
def test_what_is_refused_says_where(data, says):
    with pytest.raises((TypeError, ValueError), match=says):
        pipeline_from(data)


TEXTS = [
    ("a.json", '{"window": 8, "window": 9}', "the key 'window' stands twice"),
    ("a.yaml", "window: 8\nwindow: 9\n", "the key 'window' stands twice"),
    ("a.json", '{"window": NaN}', "wanted finite numbers"),
    ("a.json", "{", "Expecting"),
    ("a.json", "[" * 100_000, "nested too deeply"),
    ("a.yaml", "{" * 100_000, "nested too deeply|not YAML"),
    ("a.yaml", "a: [", "not YAML"),
    ("a.yaml", "!!python/object/apply:os.system ['true']", "not YAML: could not determine"),
    ("a.yaml", "a: &x [1]\nb: *x\n", "an alias"),
    ("a.yaml", "window: 2020-01-01\n", "window: wanted names and values, got datetime.date"),
    ("a.yaml", "admission: {type: per_layer, default: {type: AdmitAll}, layers: {2:9: {type: "
     "AdmitAll}}}", "wanted texts as names, got 129; write it in quotes"),
    ("a.json", '{"window": ' + "9" * 5000 + "}", "a.json: "),
    ("a.json", b"\xff\xfe", "a.json: 'utf-8'"),
    ("a.json", " " * ((1 << 22) + 1), "wanted at most 4,194,304 bytes"),
    ("a.toml", "", "wanted a name ending in .json, .yaml or .yml"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "says"), TEXTS, ids=range(len(TEXTS)))
def test_damaged_files(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((TypeError, ValueError), match=says):
        load_pipeline(tmp_path / name)


@attrs.frozen
class Doubling(Budget):
    """Does not take back what its field holds."""

    tokens: int = attrs.field(converter=lambda value: 2 * value)

    def tokens_per_head(self, seen, layer, layers):
        return self.tokens


@attrs.frozen
class Holding(Budget):
    """Holds what no file can."""

    held: object

    def tokens_per_head(self, seen, layer, layers):
        return 64


def test_what_cannot_be_written(tmp_path):
    @attrs.frozen
    class Local(Budget):
        def tokens_per_head(self, seen, layer, layers):
            return 64

    wrong = [
        (Doubling(64), "does not take back"),
        (Local(), "a module holds"),
        (Holding(torch.ones(2)), r"eviction.budget.held: wanted .*got a tensor \[2\]"),
        (Holding(float("inf")), "eviction.budget.held: wanted a finite number"),
        (Holding({1: 2}), "eviction.budget.held: wanted"),
        (Holding({"type": 2}), 'the key "type"'),
        (Holding({1, 2}), "eviction.budget.held: wanted"),
    ]
    for budget, says in wrong:
        with pytest.raises(ValueError, match=says):
            save_pipeline(CachePipeline(eviction=SnapKV(budget=budget)), tmp_path / "p.json")
    with pytest.raises(ValueError, match="wanted a name ending in"):
        save_pipeline(CachePipeline(), tmp_path / "p.pt")
    with pytest.raises(TypeError, match="wanted a CachePipeline"):
        save_pipeline(SnapKV(budget=64), tmp_path / "p.json")
    assert not list(tmp_path.iterdir())
    fits = CachePipeline(eviction=SnapKV(budget=Holding({"a": [1, 2.5, None, {"b": True}]})))
    again = pipeline_from(data_of(fits), trust_code=True)
    assert again.eviction.budget.held == {"a": (1, 2.5, None, {"b": True})}


def test_every_known_name_is_a_policy_or_budget():
    assert all(map(is_policy, KNOWN.values())) and "per_layer" not in KNOWN
