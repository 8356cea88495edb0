"""`kvpolicy generate` and `chat`: what they answer, what they keep, what they say of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvpolicy import CachePipeline, RandomGate, attach
from kvpolicy.cli import app
from kvpolicy.cli.talk import Talk
from kvpolicy.evaluation.models import tiny_llama
from tests.support.stage import tiny_tokenizer

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("talk")
    for name in ("model", "bare"):
        tiny_llama().save_pretrained(root / name)
        tokenizer = tiny_tokenizer()
        if name == "bare":
            tokenizer.chat_template = None
        tokenizer.save_pretrained(root / name)
    (root / "one.txt").write_text("first text")
    (root / "two.txt").write_text("second text")
    return root


def call(*words: object, stdin: str | None = None, code: int = 0):
    """A command's result; the CPU is named, so that every machine says the same."""
    given = [str(word) for word in (*words, "--device", "cpu")]
    done = CliRunner().invoke(app, given, input=stdin, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def plain(text: str, new: int) -> str:
    """What transformers alone answers to a text."""
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    ids = tokenizer(text, return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_generate_answers_as_transformers_does(folder: Path) -> None:
    done = call("generate", folder / "model", "hello", "--max-new-tokens", 7)
    assert done.stdout == plain("<user>hello\n<assistant>", 7) + "\n"
    said = done.stderr
    assert "23 tokens read in" in said and "7 answered in" in said
    assert "decoding: eager: " in said
    assert "cache of 1 sequence, 29 tokens; 2 layers, 4 KV heads" in said
    assert re.search(r"^admission +none$", said, re.MULTILINE)


def test_generate_without_a_template_from_stdin_after_files(folder: Path) -> None:
    files = ("--file", folder / "one.txt", "--file", folder / "two.txt", "--no-report")
    words = ("--max-new-tokens", 5, "--raw")
    done = call("generate", folder / "model", "-", *files, *words, stdin="asked")
    assert done.stdout == plain("first text\n\nsecond text\n\nasked", 5) + "\n"
    assert "cache of" not in done.stderr
    same = call("generate", folder / "bare", "-", *files, "--max-new-tokens", 5, stdin="asked")
    assert same.stdout == done.stdout


def test_generate_draws_by_a_seed(folder: Path) -> None:
    words = ("generate", folder / "model", "hello", "--temperature", 1.5, "--max-new-tokens", 12)
    found = [call(*words, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_chat_keeps_one_cache_for_all_turns(folder: Path) -> None:
    words = ("--system", "be brief", "--snapkv", 40, "--max-new-tokens", 6)
    done = call("chat", folder / "model", *words, stdin="hello\n\nand more of it\n")
    answers = done.stdout.split("\n")
    assert len(answers) >= 3 and "12 answered in" in done.stderr
    read = len("<system>be brief\n<user>hello\n<assistant>") + len(
        "\n<user>and more of it\n<assistant>"
    )
    assert f"{read} tokens read in" in done.stderr
    assert f"cache of 1 sequence, {read + 11} tokens" in done.stderr
    assert "SnapKV on all layers: evicted" in done.stderr


def test_chat_turns_are_what_one_long_text_gives() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with attach(model, CachePipeline()) as attached:
        talk = Talk(attached, tokenizer, GREEDY)
        talk.say("hello")
        first = talk.ids
        talk.say("and more")
        second = talk.ids
        assert talk.cache.report().tokens == second.shape[1] - 1
    wanted = tokenizer("<user>hello\n<assistant>", return_tensors="pt").input_ids
    for tail, found in (("", first), ("\n<user>and more\n<assistant>", second)):
        more = tokenizer(tail, return_tensors="pt").input_ids.long()
        ids = torch.cat([wanted, more], 1) if tail else wanted
        mask = torch.ones_like(ids)
        wanted = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
        assert torch.equal(found, wanted)


def test_an_end_that_was_answered_is_not_said_again() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokenizer.eos_token = "\n"
    with attach(model, CachePipeline()) as attached:
        talk = Talk(attached, tokenizer, GREEDY)
        for last, wanted in (("\n", "<user>x\n<assistant>"), ("a", "\n<user>x\n<assistant>")):
            talk.ids = tokenizer(f"b{last}", return_tensors="pt").input_ids
            assert "".join(map(chr, talk._encode("x"))) == wanted


def test_the_policies_that_are_asked_for_act(folder: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine_for_talk.py").write_text(
        "from kvpolicy import CachePipeline, RandomGate\n"
        "half = CachePipeline(admission=RandomGate(sparsity=0.5), window=4)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *__import__("sys").path])
    done = call("generate", folder / "model", "hello " * 20, "--pipeline", "mine_for_talk:half")
    assert "RandomGate on all layers: admitted " in done.stderr
    assert RandomGate(sparsity=0.5).sparsity == 0.5


def test_ctrl_c_ends_a_chat_with_its_report(folder: Path, monkeypatch) -> None:
    turns = iter(["hello"])

    def asked(prompt: str) -> str:
        try:
            return next(turns)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("builtins.input", asked)
    done = call("chat", folder / "model", "--max-new-tokens", 3)
    assert "3 answered in" in done.stderr and "cache of 1 sequence" in done.stderr
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    assert call("chat", folder / "model").stderr.endswith("nothing read\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("chat", "bare"), "error: model: wanted a tokenizer with a chat template, "),
        (("generate", "bare", "x", "--system", "y"), "error: system: wanted a chat template"),
        (("generate", "model", "", "--raw"), "error: prompt: wanted text, got none"),
        (("generate", "model", "x", "--gate", "keep25"), "error: gate: wanted a file or one of "),
        (("generate", "model", "x", "--duo", "none"), "error: duo: wanted a folder or one of "),
        (("generate", "model", "x", "--top-p", "2"), "--top-p"),
        (("generate", "model", "x", "--file", "none.txt"), "none.txt"),
    ],
)
def test_what_cannot_be_is_one_sentence(folder: Path, words: tuple, message: str) -> None:
    command, model, *rest = words
    said = call(command, folder / model, *rest, code=2).stderr
    assert message in said and "Traceback" not in said


def test_policies_of_a_file_are_imported_where_they_are_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("half_for_talk.py").write_text(
        "import attrs\nfrom kvpolicy import LocalAttention\n\n\n"
        "@attrs.frozen(kw_only=True)\nclass Mine(LocalAttention):\n    pass\n"
    )
    Path("mine.json").write_text('{"admission": {"type": "half_for_talk:Mine", "window": 8}}')
    words = (
        "generate",
        folder / "model",
        "hello",
        "--max-new-tokens",
        3,
        "--pipeline",
        "mine.json",
    )
    assert "trust_code=True" in call(*words, code=2).stderr
    assert "Mine" in call(*words, "--trust-code").stderr
