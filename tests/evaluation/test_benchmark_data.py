"""Loaders on small files in the columns that benchmarks are shared in, and what RULER makes."""

from __future__ import annotations

import json
import re
import string
import sys
from types import SimpleNamespace

import pytest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from kvpolicy.evaluation.benchmarks.benchmark import Wanted  # noqa: E402
from kvpolicy.evaluation.benchmarks.chat import Chat  # noqa: E402
from kvpolicy.evaluation.benchmarks.fit import longest, tokens_of  # noqa: E402
from kvpolicy.evaluation.benchmarks.item import Item, by_context  # noqa: E402
from kvpolicy.evaluation.benchmarks.published import PUBLISHED  # noqa: E402
from kvpolicy.evaluation.benchmarks.registry import BENCHMARKS, benchmark_of  # noqa: E402
from kvpolicy.evaluation.benchmarks.ruler import SYNTHETIC  # noqa: E402

WORDS = [a + b + c + d for a in "bdfgklmn" for b in "aeiou" for c in "klmnprst" for d in "aeio"]
TEXT = " ".join(f"The {a} saw {b}." for a, b in zip(WORDS, WORDS[7:], strict=False))


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    vocabulary = {c: i for i, c in enumerate(string.printable)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    raw.decoder = tokenizers.decoders.Fuse()
    chat = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}~"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=chat)


def wanted(tokenizer, length=3000, contexts=2, data=(), seed=0):
    return Wanted(
        tokenizer=tokenizer, text=TEXT, length=length, contexts=contexts, seed=seed, data=data
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("task", SYNTHETIC)
def test_ruler_s_contexts_are_as_long_as_asked_for(task, tokenizer):
    ruler = BENCHMARKS["ruler"]
    unit = {"cwe": 200, "niah_multikey_3": 120}.get(task, 100)
    for length in (4500, 6000):
        for group in by_context(ruler.items(task, wanted(tokenizer, length))):
            assert length - unit < tokens_of(Chat(tokenizer), group) <= length


@pytest.mark.parametrize("task", SYNTHETIC)
def test_ruler_draws_by_the_seed_and_the_same_at_every_length(task, tokenizer):
    ruler = BENCHMARKS["ruler"]
    short, again, long, other = (
        ruler.items(task, wanted(tokenizer, length, seed=seed))
        for length, seed in ((4500, 0), (4500, 0), (6000, 0), (4500, 1))
    )
    assert short == again
    assert [x.answers for x in short] == [x.answers for x in long]
    assert [x.question for x in short] == [x.question for x in long]
    assert len(long[0].context) > len(short[0].context)
    assert [x.answers for x in short] != [x.answers for x in other]
    assert short[0].answers != short[-1].answers  # contexts differ


@pytest.mark.parametrize("task", [x for x in SYNTHETIC if x.startswith("niah")])
def test_every_needle_s_value_stands_once_in_its_context(task, tokenizer):
    kinds = {"niah_single_3": r"[0-9a-f-]{36}", "niah_multikey_3": r"[0-9a-f-]{36}"}
    several = {"niah_multivalue": 4, "niah_multiquery": 4}
    for item in BENCHMARKS["ruler"].items(task, wanted(tokenizer)):
        assert len(set(item.answers)) == several.get(task, 1)
        for answer in item.answers:
            assert item.context.count(answer) == 1
            assert re.fullmatch(kinds.get(task, r"\d{7}"), answer)
        assert BENCHMARKS["ruler"].score(" and ".join(item.answers), item) == 1.0


def test_multikey_tasks_ask_several_questions_of_a_context(tokenizer):
    found = BENCHMARKS["ruler"].items("niah_multikey_1", wanted(tokenizer, contexts=1))
    assert len(found) == 4 and len(by_context(found)) == 1
    assert len({x.answers for x in found}) == 4


def test_variables_words_and_coded_words_are_what_the_context_says(tokenizer):
    ruler = BENCHMARKS["ruler"]
    for item in ruler.items("vt", wanted(tokenizer)):
        value = re.search(r"value (\d+)", item.question)[1]
        body = item.context.split("Example:")[1].split("\n\n")[1]
        known = {value}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", body):
            known |= {name} if source in known else set()
        assert known - {value} == set(item.answers) and len(item.answers) == 5
    for item in ruler.items("cwe", wanted(tokenizer, 9000)):
        listed = re.findall(r"\d+\. (\w+)", item.context)
        assert {x for x in listed if listed.count(x) == 30} == set(item.answers)
        assert {listed.count(x) for x in listed} == {30, 3}
    for item in ruler.items("fwe", wanted(tokenizer)):
        coded = item.context.split("\n\n")[1].split()
        most = sorted({*coded} - {"....."}, key=coded.count, reverse=True)
        assert tuple(most[:3]) == item.answers
        assert len({coded.count(x) for x in most[:4]}) == 4  # no ties


def test_ruler_s_questions_come_from_files(tokenizer, tmp_path):
    passages = [f"{word} lies in {word}land." for word in WORDS[:30]]
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": text,
                        "qas": [
                            {
                                "question": f"Where lies {word}?",
                                "answers": [{"text": f"{word}land"}, {"text": f"{word}land"}],
                            },
                            {"question": "?", "answers": [], "is_impossible": True},
                        ],
                    }
                    for word, text in zip(WORDS, passages, strict=False)
                ]
            }
        ]
    }
    hotpot = [
        {
            "question": "Which?",
            "answer": "both",
            "context": [["A", ["One. ", "Two."]], ["B", ["Three."]]],
        }
    ]
    (tmp_path / "s.json").write_text(json.dumps(squad))
    (tmp_path / "h.json").write_text(json.dumps(hotpot))
    ruler = BENCHMARKS["ruler"]
    assert ruler.tasks() == SYNTHETIC
    assert ruler.tasks((tmp_path,))[-2:] == ("qa_1", "qa_2")
    for item in ruler.items("qa_1", wanted(tokenizer, 900, data=(tmp_path,))):
        (answer,) = item.answers
        assert item.context.count(answer) == 1 and "Document 2:" in item.context
        assert tokens_of(Chat(tokenizer), [item]) <= 900
        assert ruler.score(f"In {answer}.", item) == 1.0
    (item, _) = ruler.items("qa_2", wanted(tokenizer, 900, data=(tmp_path,)))
    assert item.context.count("One. Two.") == 1 and item.answers == ("both",)
    with pytest.raises(ValueError, match="task: wanted one of .*got 'qa_1'"):
        ruler.chosen(["qa_1"])


def test_a_length_that_holds_no_context_is_refused(tokenizer):
    with pytest.raises(ValueError, match="length: wanted at least .* for vt, got 100"):
        BENCHMARKS["ruler"].items("vt", wanted(tokenizer, 100))
    (few,) = [longest(tokenizer, lambda n: [Item(task="t", context="a" * n, question="b",
              answers="c", new_tokens=8)], 200)]  # fmt: skip
    assert tokens_of(Chat(tokenizer), [Item(task="t", context="a" * few, question="b",
                     answers="c", new_tokens=8)]) == 200  # fmt: skip


def test_a_needle_lies_at_its_depth(tokenizer):
    niah = BENCHMARKS["niah"]
    at = {}
    for task in niah.tasks():
        for item in niah.items(task, wanted(tokenizer, contexts=1)):
            text = item.context.split("\n\n")[1]
            at[task] = text.index("The special number") / len(text)
            assert item.context.count(item.answers[0]) == 1
    assert at["depth 0"] == 0 and at["depth 100"] > 0.9
    assert at["depth 25"] == pytest.approx(0.25, abs=0.05)
    assert at["depth 50"] == pytest.approx(0.5, abs=0.05)


ROW = {"context": "Some text.", "question": "What?", "answer_prefix": "Answer:",
       "answers": ["this", "that"], "all_classes": ["this", "those"], "task": "trec",
       "max_new_tokens": 32, "length": 12}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_columns_from_a_folder(name, tokenizer, tmp_path):
    benchmark = PUBLISHED[name]
    task = benchmark.tasks()[0]
    write(tmp_path / f"{task}.jsonl", [ROW, {**ROW, "question": "Who?"}, {**ROW, "context": "B"}])
    assert benchmark.tasks((tmp_path,)) == (task,)
    found = benchmark.items(task, wanted(tokenizer, contexts=9, data=(tmp_path,)))
    assert [x.question for x in found] == ["What?", "Who?", "What?"]
    first = found[0]
    assert (first.task, first.answers, first.lead, first.new_tokens) == (
        task, ("this", "that"), "Answer:", 32,
    )  # fmt: skip
    assert first.about["all_classes"] == ["this", "those"]
    assert len(by_context(found)) == 2
    one = benchmark.items(task, wanted(tokenizer, contexts=1, data=(tmp_path,)))
    assert len(by_context(one)) == 1


def test_published_data_comes_from_the_hub_by_configuration(monkeypatch, tokenizer):
    asked = []

    def load_dataset(*names, split):
        asked.append((names, split))
        return [{**ROW, "answer": 12, "answers": None}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (item,) = PUBLISHED["loogle"].items("longdep_qa", wanted(tokenizer))
    assert item.answers == ("12",)
    PUBLISHED["aime25"].items("aime25", wanted(tokenizer))
    assert asked == [
        (("simonjegou/loogle", "longdep_qa"), "test"),
        (("alessiodevoto/aime25",), "test"),
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"kvpolicy\[benchmarks\]"):
        PUBLISHED["loogle"].items("longdep_qa", wanted(tokenizer))


def test_what_is_missing_or_left_out_is_named(tokenizer, tmp_path):
    write(tmp_path / "trec.jsonl", [{"context": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="trec, row 0: wanted the column 'question', got none"):
        PUBLISHED["longbench"].items("trec", wanted(tokenizer, data=(tmp_path,)))
    with pytest.raises(ValueError, match="longbook_sum_eng is left out: its summaries"):
        PUBLISHED["infinitebench"].chosen(["longbook_sum_eng"])
    with pytest.raises(ValueError, match="task: wanted one of narrativeqa, .*got 'all'"):
        PUBLISHED["longbench"].chosen(["all"])
    with pytest.raises(ValueError, match=r"data: wanted a folder with one of passkey.jsonl"):
        PUBLISHED["infinitebench"].tasks((tmp_path,))
    with pytest.raises(ValueError, match="benchmark: wanted one of ruler, .*got 'rule'"):
        benchmark_of("rule")
    with pytest.raises(ValueError, match="benchmark: there is no file none.jsonl"):
        benchmark_of("none.jsonl")


def test_a_user_s_file(tokenizer, tmp_path):
    row = {"context": "a\u2028b", "question": "q", "answer": ["x", "y"]}
    more = {"context": "c", "question": "q", "answer": "z", "task": "two", "max_new_tokens": 3}
    benchmark = benchmark_of(str(write(tmp_path / "mine.jsonl", [row, more])))
    assert benchmark.tasks() == ("mine", "two")
    (item,) = benchmark.items("mine", wanted(tokenizer))
    assert item.context == "a\u2028b" and item.answers == ("x", "y")
    assert benchmark.score("The Y.", item) == 1.0 and benchmark.score("z", item) == 0.0
    (item,) = benchmark.items("two", wanted(tokenizer))
    assert item.new_tokens == 3
    for line, said in (
        ("{}", "line 2: wanted 'context' as a text, got None"),
        ('{"context": "c", "question": "q", "answer": []}', "line 2: wanted 'answer'.*list of"),
        ("[1]", "line 2: wanted an object"),
        ("{", "line 2: no JSON"),
        (json.dumps({**more, "max_new_tokens": 0}), "line 2: wanted 'max_new_tokens' as"),
    ):
        (tmp_path / "bad.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(ValueError, match=f"bad.jsonl, {said}"):
            benchmark_of(str(tmp_path / "bad.jsonl")).tasks()


def test_helmet_reads_each_kind_by_its_columns(tokenizer, tmp_path):
    folder = tmp_path / "data" / "kilt"
    folder.mkdir(parents=True)
    ctxs = [{"id": "1", "title": "A", "text": "One."}, {"id": "2", "title": "B", "text": "Two."}]
    write(folder / "nq.jsonl", [{"question": "q", "answers": ["two"], "ctxs": ctxs}])
    ranked = [{**x, "label": i} for i, x in enumerate(ctxs)]
    write(folder / "msmarco.jsonl", [{"qid": "7", "query": "q", "ctxs": ranked}])
    write(folder / "json_kv.jsonl",
          [{"context": '{"k": "v"}', "question": "k", "answer": "v", "num_kvs": 1,
            "demos": [["a", "1"], ["b", "2"], ["c", "3"]]}])  # fmt: skip
    write(folder / "icl_trec.jsonl", [{"context": "x\nlabel: 3", "question": "y", "answer": "3"}])
    needle = {"query": "key", "type_needle_v": "number", "answer": ["12", "13"]}
    write(folder / "niah_mk.jsonl", [{"context": "c", **needle}])
    write(folder / "narrativeqa_1.jsonl", [{"context": "c", "question": "q", "answer": "a"}])
    helmet, ask = BENCHMARKS["helmet"], wanted(tokenizer, data=(tmp_path,))
    assert set(helmet.tasks((tmp_path,))) == {"nq", "msmarco", "json_kv", "icl_trec", "niah_mk"}
    with pytest.raises(ValueError, match="narrativeqa_1 is left out: its answers are judged"):
        helmet.chosen(["narrativeqa_1"], (tmp_path,))
    with pytest.raises(ValueError, match="data: wanted files of the benchmark's tasks"):
        helmet.chosen(None)
    found = {task: helmet.items(task, ask)[0] for task in helmet.tasks((tmp_path,))}
    assert "Document (Title: B): Two." in found["nq"].context
    assert helmet.score("Two, I think", found["nq"]) == 1.0
    assert helmet.score("ID2 > ID1", found["msmarco"]) == 1.0
    assert helmet.score("ID1 > ID2", found["msmarco"]) == pytest.approx(0.6309, abs=1e-4)
    assert "Key: b\nCorresponding value: 2" in found["json_kv"].question
    assert "Key: c" not in found["json_kv"].question
    assert helmet.score("it is v", found["json_kv"]) == 1.0
    assert helmet.score("3\nlabel", found["icl_trec"]) == 1.0
    assert helmet.score("13", found["niah_mk"]) == 0.5
    write(folder / "bad.jsonl", [{"question": "q", "ctxs": ctxs}])
    with pytest.raises(ValueError, match="bad.jsonl, object 1: wanted the column 'answers'"):
        helmet.items("bad", ask)


def test_a_context_that_is_too_long_loses_its_middle(tokenizer):
    def item(question):
        return Item(task="t", context="0123456789" * 3, question=question, answers="a",
                    lead="L", new_tokens=5)  # fmt: skip

    # The longer question takes 2 line ends, 2 for itself, 2 of the template and 1 lead, 5 a reply.
    (whole,) = Chat(tokenizer).readings([item("q")])
    assert len(whole.context) == 1 + 30 and whole.dropped == 0
    assert tokenizer.decode(whole.questions[0]) == "\n\nq>~L"
    (cut,) = Chat(tokenizer, 1 + 10 + 7 + 5).readings([item("q"), item("q?")])
    assert tokenizer.decode(cut.context) == "<" + "01234" + "56789" and cut.dropped == 20
    assert len(cut.questions) == 2
    # Seen: the question is part of what is read, and each is read by itself.
    one, two = Chat(tokenizer, seen=True).readings([item("q"), item("q?")])
    assert tokenizer.decode(two.context).endswith("9\n\nq?")
    assert tokenizer.decode(one.questions[0]) == ">~L"
    with pytest.raises(ValueError, match="t: 12 tokens hold no context beside a reply"):
        Chat(tokenizer, 12).readings([item("q")])
