"""Scorers against values worked out by hand from the benchmarks' own definitions."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from kvpolicy.evaluation.benchmarks import scores  # noqa: E402
from kvpolicy.evaluation.benchmarks.item import Item  # noqa: E402
from kvpolicy.evaluation.benchmarks.published import PUBLISHED  # noqa: E402
from kvpolicy.evaluation.benchmarks.rouge import rouge_l  # noqa: E402

CASES = [
    # RULER: the part of the references in the answer; for questions any of them.
    ("all_found", "It is 1234567 and ABC.", ["1234567", "abc", "999"], 2 / 3),
    ("any_found", "in Paris", ["London", "paris"], 1.0),
    ("any_found", "in Rome", ["London", "paris"], 0.0),
    # SQuAD's normalization: case, punctuation, articles, spaces.
    ("exact", "The  Cat!", ["a cat"], 1.0),
    ("exact", "The cats", ["cat"], 0.0),
    ("contains", "It was the Big-Apple, yes", ["bigapple"], 1.0),
    ("contains", "nothing", ["bigapple"], 0.0),
    # 2 words of 3 found, 2 of 2 wanted: 2 * 2 / 5.
    ("word_f1", "a red old house", ["the red house"], 2 * 2 / 5),
    ("word_f1", "green", ["red house", "green tree"], 2 / 3),
    ("word_f1", "nothing", ["red house"], 0.0),
    ("character_f1", "\u7ea2\u5c4b\u3002", ["\u7ea2\u623f\u5b50"], 2 * 1 / 5),
    # LongBench's code: the first line without a quoted or commented part.
    ("edit_similarity", "\n# add\nx = 1  # one\ny = 12", ["y = 12"], 1.0),
    ("edit_similarity", "ab", ["ax"], 0.5),
    ("edit_similarity", "# nothing", ["x"], 0.0),
    ("of_numbers", "Paragraph 3, or 4", ["Paragraph 3"], 0.5),
    ("of_numbers", "none", ["Paragraph 3"], 0.0),
    ("of_numbers", "13", ["3"], 0.0),
    # InfiniteBench.
    ("first_digits", "the key 00712, not 5", ["00712"], 1.0),
    ("first_digits", "the key 712", ["00712"], 0.0),
    ("first_number", "about 2.50 or 3", ["2.5"], 1.0),
    ("first_number", "about 3 or 2.5", ["2.5"], 0.0),
    ("last_number", "it returns: 12.", ["12"], 1.0),
    ("last_number", "12 is it", ["12"], 0.0),
    ("leading_numbers", "1, 2, 4, 8", ["1", "2", "3", "8"], 0.5),
    ("word_found", '{"key": "ab-12"}', ["ab-12"], 1.0),
    ("word_found", "xab-12", ["ab-12"], 0.0),
    ("choice", "I think A, no: B\nC", ["B"], 1.0),
    ("choice", "C) because of A", ["C"], 1.0),
    ("choice", "C) because of A", ["B"], 0.0),
    # LooGLE: a dict alone.
    ("masks_filled", "{'<mask-0>': 'Ann', '<mask-1>': 'Bo'}",
     ["{'<mask-0>': 'Ann', '<mask-1>': 'Cy'}"], 0.5),
    ("masks_filled", "Here: {'<mask-0>': 'Ann'}", ["{'<mask-0>': 'Ann'}"], 0.0),
    # LongBench v2.
    ("stated", "So: **The correct answer is (B)**", ["B"], 1.0),
    ("stated", "The correct answer is C", ["B"], 0.0),
    ("stated", "B", ["B"], 0.0),
    # The last box, nested braces.
    ("mathematical", r"\boxed{1} then \boxed{\frac{1}{2}}", [r"\dfrac{1}{2}"], 1.0),
    ("mathematical", r"so \boxed{042}", ["42"], 1.0),
    ("mathematical", "so 42", ["42"], 0.0),
    # HELMET: gains 1 / log2(rank + 1) times relevance.
    ("ndcg_at_10", "Ranking: ID2 > ID1 > ID3", ["1 0", "2 3", "3 0"], 1.0),
    ("ndcg_at_10", "[ID: 1] > [ID: 2]", ["1 0", "2 3", "3 0"], 1 / 1.5849625007211562),
    ("ndcg_at_10", "no idea", ["1 0", "2 3"], 0.0),
    ("labelled", "label: 12\nlabel: 3", ["12"], 1.0),
    ("labelled", " 12 ", ["12"], 1.0),
    ("labelled", "label: 12 or so", ["12"], 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer", "references", "wanted"), CASES)
def test_a_score(name, answer, references, wanted):
    assert getattr(scores, name)(answer, references) == pytest.approx(wanted)


def test_classes_inside_the_right_one_do_not_count_against_it():
    classes = ["city", "city name", "date"]
    assert scores.of_class("a city name", ["city name"], classes) == 1.0
    assert scores.of_class("a city name or a date", ["city name"], classes) == 0.5
    assert scores.of_class("a date", ["city name"], classes) == 0.0


def test_rouge_counts_different_words_of_the_sentences_common_subsequences():
    # "the cat sat" of 3 different words in 4, all 3 found.
    found = rouge_l("the cat sat", "the cat sat down")
    assert found == pytest.approx((1.0, 3 / 4, 2 * 0.75 / 1.75))
    # Order counts inside a sentence, but each sentence looks in every sentence of the answer.
    assert rouge_l("b a", "a b").f1 == pytest.approx(0.5)
    assert rouge_l("c d. a b", "a b. c d").f1 == pytest.approx(1.0)
    assert rouge_l("a a a", "a").precision == 1.0  # as sets
    assert rouge_l("", "a") == rouge_l("...", "a") == (0.0, 0.0, 0.0)


def test_every_published_task_scores_its_reference_best():
    right = {"lcc": "x = 1", "passage_count": "3", "passage_retrieval_en": "Paragraph 3",
             "shortdep_cloze": "{'<mask-0>': 'Ann'}"}  # fmt: skip
    said = {"0shot": "The correct answer is (A)", "aime25": r"\boxed{12}",
            "math500": r"\boxed{12}"}  # fmt: skip
    references = {"0shot": "A", "longbook_choice_eng": "A", "code_debug": "A"}
    for benchmark in PUBLISHED.values():
        for task in benchmark.tasks():
            reference = references.get(task, right.get(task, "12"))
            item = Item(task=task, context="", question="", answers=reference,
                        about={"all_classes": ["12", "13"]})  # fmt: skip
            assert benchmark.score(said.get(task, reference), item) == 1.0, task
            assert benchmark.score("?", item) == 0.0, task


def test_the_few_shot_tasks_of_longbench_read_the_first_line():
    item = Item(task="triviaqa", context="", question="", answers="Rome")
    assert PUBLISHED["longbench"].score("\nRome\nPassage: more of it", item) == 1.0
