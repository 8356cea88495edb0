"""The list of methods: each at the size it was asked for, whatever its heads hold."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest
import torch

pytest.importorskip("transformers")


from kvpolicy import JudgeQ, QFilters, Tokens, TriAttention, admission, budget, eviction, selection
from kvpolicy.evaluation.grid import cell, methods, runner
from kvpolicy.evaluation.grid.variants import FULL, SEEN, Room
from kvpolicy.evaluation.methods.files import FROM_FILES, GATES, Given, named_files
from kvpolicy.evaluation.methods.left_out import NEVER, NO_METHOD, left_out
from kvpolicy.evaluation.models import tiny_llama, tiny_tokenizer
from kvpolicy.evaluation.tasks.prompts import Example, Question
from tests.support.evaluation.small import small_gate

LENGTH, ASKED, PAGE = 640, 20, 8
GIVEN = Given(gate=small_gate())
VARIANTS = methods.method_variants([0.4], 32, GIVEN)
NAMES = [x.name for x in VARIANTS]
PROMPTS = tuple(methods.PROMPTS)
# One of a kind; the slow suite takes all.
SOME = {"full", "SnapKV 0.4", "AdaKV, question seen 0.4", "H2O 0.4", "RocketKV 0.4", "FastGen 0.4"}


def each(tuned):
    """Names of variants with a budget, or of those whose number is searched for."""
    names = [x.name for x in VARIANTS if x.tuned == tuned and not (tuned and SEEN in x.name)]
    return [pytest.param(x, marks=() if x in SOME else pytest.mark.slow) for x in names]


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(4)

    def one():
        ids = torch.randint(0, 512, (LENGTH + ASKED,), generator=generator).tolist()
        question = Question(tuple(ids[LENGTH:-1]), tuple(ids[-1:]))
        return Example(context_ids=tuple(ids[:LENGTH]), questions=(question,))

    return [one(), one()]


def answered(variant, pipeline, examples):
    return cell.answer(
        tiny_llama(), pipeline, examples, question_in_prompt=variant.question_in_prompt,
        captured=False, page_size=PAGE, tokenizer=tiny_tokenizer(),
    ).footprint  # fmt: skip


@pytest.mark.parametrize("name", each(tuned=False))
def test_every_method_takes_the_bytes_that_it_is_given(name, examples):
    variant = next(x for x in VARIANTS if x.name == name)
    room = Room(variant.keep * LENGTH, LENGTH + ASKED, ASKED, page=PAGE)
    found = answered(variant, variant.build(room), examples)
    frees = variant.family not in (FULL, *PROMPTS) and methods.READING not in name
    slots = room.slots if frees else LENGTH + ASKED
    assert found.slots == pytest.approx(slots, abs=2 * PAGE)
    if methods.READING in name:
        assert found.read_tokens == pytest.approx(room.slots, abs=PAGE)


@pytest.mark.parametrize("name", each(tuned=True))
def test_a_number_is_searched_for_where_there_is_no_budget(name, examples):
    variant, model = next(x for x in VARIANTS if x.name == name), tiny_llama()
    room = Room(variant.keep * LENGTH, LENGTH + ASKED, ASKED, page=PAGE)
    run = runner.Runner(
        model=model, tokenizer=None, text="", contexts=1, seed=0, deadline=0.0, store=None,
        results=[], page_size=PAGE,
    )  # fmt: skip
    pipeline = run._tuned(variant.build(room), room, examples[:1])
    found = cell.answer(model, pipeline, examples[:1], page_size=PAGE, captured=False).footprint
    # What one number turns may have steps: of layers as a whole, of sets of tokens.
    steps = {"SimLayerKV": 0.5, "FastGen": 0.35, "DBudgetKV": 0.25}.get(variant.family, 0.1)
    assert found.slots == pytest.approx(room.slots, rel=steps)


@pytest.mark.parametrize("seen", [pytest.param(True, marks=pytest.mark.slow), False])
def test_files_make_methods_that_take_their_bytes(seen, tmp_path, examples):
    """Judge Q's tokens look back behind the question, too, where the prompt has it."""
    generator = torch.Generator().manual_seed(5)
    parts = {name: torch.rand(2, 4, 16, generator=generator) for name in ("real", "imaginary")}
    size = torch.hypot(*parts.values()) + 0.1
    made = {
        "Judge Q": JudgeQ(budget=Tokens(1), embeds=torch.randn(4, 128, generator=generator)),
        "Q-Filters": QFilters(budget=Tokens(1), filters=torch.randn(2, 2, 32, generator=generator)),
        "TriAttention": TriAttention(budget=Tokens(1), size=size, **parts),
    }
    texts = []
    for name, policy in made.items():
        policy.save(tmp_path / f"{name}.safetensors")
        texts.append(f"{name}={tmp_path / name}.safetensors")
    given = Given(files=named_files(texts))
    assert not left_out(given).keys() & made.keys()
    for variant in methods.method_variants([0.4], 32, given):
        name, _, rest = variant.family.partition(SEEN)
        if name in made and (SEEN in variant.family) == seen and not rest:
            room = Room(variant.keep * LENGTH, LENGTH + ASKED, ASKED, page=PAGE)
            found = answered(variant, variant.build(room), examples)
            assert found.slots == pytest.approx(room.slots, abs=2 * PAGE), name
            made.pop(name)
    assert not made


def test_files_are_of_methods_and_there(tmp_path):
    with pytest.raises(ValueError, match="METHOD=FILE with one of Q-Filters, .*got 'SnapKV=x'"):
        named_files(["SnapKV=x"])
    with pytest.raises(ValueError, match="a file for KVzap, got 'none'"):
        named_files(["KVzap=none"])


def policies():
    """Classes of policies and budgets that the packages name."""
    found = {}
    for package in (admission, selection, eviction, budget):
        bases = [getattr(package, x) for x in ("Admission", "Selection", "Eviction", "Budget")
                 if x in vars(package)]  # fmt: skip
        for name, kind in vars(package).items():
            if isinstance(kind, type) and attrs.has(kind) and issubclass(kind, tuple(bases)):
                found[name] = kind
    return found


def used(value):
    """Names of the classes of a value made of attrs values."""
    if not attrs.has(type(value)):
        return set()
    parts = (used(getattr(value, field.name)) for field in attrs.fields(type(value)))
    return {type(value).__name__}.union(*parts)


def test_every_policy_is_compared_or_says_why_not():
    """Add a new one to kvpolicy/evaluation/methods, or to its left_out.py with the reason."""
    pattern = Path(__file__).parents[2] / "kvpolicy/pretrained/duo-smollm2-135m-instruct"
    given = attrs.evolve(GIVEN, duo=pattern)
    room = Room(400, 1000, 20, page=4)
    built = [x.build(room) for x in methods.method_variants([0.4], 32, given)]
    found = set().union(*map(used, built)) & policies().keys()
    files = {kind.__name__ for kind in (*FROM_FILES.values(), *GATES.values())}
    assert found | files | NEVER.keys() | NO_METHOD.keys() == policies().keys()
    assert not (found | files) & (NEVER.keys() | NO_METHOD.keys() - {"AdmitAll", "SelectAll",
                                                                     "KeepAll"})  # fmt: skip
    assert left_out(given).keys() == NEVER.keys() | FROM_FILES.keys() | GATES.keys()
    assert {"WriteGate", "DuoAttention", "HeadKV"} <= left_out(Given()).keys()


def test_every_method_of_the_page_is_compared_or_says_why_not():
    page = (Path(__file__).parents[2] / "docs/policies.md").read_text()
    table = page[page.index("## At a glance") : page.index("## Coming from kvpress")]
    named = set(re.findall(r"^\| \[([^\]]+)\]", table, re.MULTILINE))
    families = {x.family.removesuffix(methods.READING).lower() for x in VARIANTS}
    left = {name.lower() for name in left_out(GIVEN)} | {"presses of kvpress"}
    # Under the names of what they are used with.
    also = {
        "ranked": "ranked by the write gate",
        "across layers": "snapkv across layers",
        "lazy layers": "snapkv, lazy layers",
        "dms": "write gate at the prompt's end",
        "total cap": "totalcap",
        "lu-kv": "lukv",
    }
    found = {also.get(name.lower(), name.lower()) for name in named}
    assert len(found) > 35 and found <= families | left
    for name in named - {"AdaKV", "PyramidKV", "HeadKV", "Across layers", "Lazy layers"}:
        entry = page.partition(f"\n### {name[0].upper() + name[1:]}\n")[2].partition("\n##")[0]
        assert entry, f"no entry: {name}"
        for field in ("- Holds", "- Acts", "- Paper"):
            assert field in entry or name in ("Ranked", "presses of kvpress", "AdaEA"), (
                name,
                field,
            )


def test_a_size_below_the_window_is_skipped():
    room = Room(20, LENGTH + ASKED, ASKED, page=PAGE)
    none = [x.name for x in VARIANTS if x.build(room) is None]
    assert {"SnapKV 0.4", "AdaKV 0.4", "FastGen 0.4", "Quest (reads) 0.4"} <= set(none)


def test_each_name_stands_once():
    assert len(NAMES) == len(set(NAMES)) and NAMES[0] == FULL
    twice = methods.method_variants([0.4, 0.2], 32, GIVEN)
    fixed = 1 + len(PROMPTS)
    assert len(twice) == fixed + 2 * (len(VARIANTS) - fixed)
