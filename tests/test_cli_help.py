"""What the command line says of itself: versions, examples, completion, plans by fraction."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import kvpolicy
from kvpolicy.bench import GROUPS
from kvpolicy.cli import app, common
from kvpolicy.cli.commands import COMMANDS
from kvpolicy.cli.completion import Shell, command_of, script
from kvpolicy.cli.examples import EXAMPLES, WIDTH, wrapped
from kvpolicy.cli.progress import Progress
from kvpolicy.evaluation.models import tiny_llama
from kvpolicy.evaluation.tasks import TASKS
from kvpolicy.pretrained import KNOWN
from tests.support.evaluation.small import small_gate

NAMES = [x.__name__.replace("_", "-") for x in COMMANDS]


def call(*words: object, code: int = 0):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def test_version() -> None:
    assert call("--version").stdout == f"kvpolicy {kvpolicy.__version__}\n"


def test_every_command_has_an_example_in_its_help() -> None:
    assert set(EXAMPLES) == set(NAMES)
    for name in NAMES:
        lines = [line.strip() for line in call(name, "--help").stdout.splitlines()]
        for said, example in EXAMPLES[name]:
            at = lines.index(f"# {said}")
            shown = wrapped(example)
            assert lines[at + 1 : at + 1 + len(shown)] == [line.strip() for line in shown]
    assert "kvpolicy plan smollm2" in call("--help").stdout


def calls() -> list[list[str]]:
    return [shlex.split(line) for found in EXAMPLES.values() for _, line in found]


def test_examples_are_commands_that_exist(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("notes")
    group = typer.main.get_command(app)
    for words in calls():
        if words[0] == "eval":
            continue
        assert words[0] == "kvpolicy"
        given = words[2 : words.index("<")] if "<" in words else words[2:]
        group.commands[words[1]].make_context(words[1], given).close()


def test_a_wrapped_call_is_the_same_words() -> None:
    for found in EXAMPLES.values():
        for _, line in found:
            lines = wrapped(line)
            assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(line)
            assert max(map(len, lines)) <= WIDTH + 4


BASH = """
source "$1"
shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _kvpolicy; printf '%s\\n' "${COMPREPLY[@]}"
"""
GATES = sorted(x for x in KNOWN if not x.startswith("duo"))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([""], {*NAMES, "--help", "--version"}),
        (["tr"], {"train-gate", "train-duo"}),
        (["plan", "smol"], {"smollm2"}),
        (["generate", "org/"], {"org/model-a"}),
        (["plan", "x", "--gate", "smol"], set(GATES)),
        (["plan", "x", "--gate", "no"], {"notes.txt"}),
        (["plan", "x", "--duo", "duo"], {"duo-smollm2-135m-instruct"}),
        (["evaluate", "--task", ""], set(TASKS)),
        (["pareto", "x", "--task", "one\\ "], {x for x in TASKS if x.startswith("one ")}),
        (["inspect", "x", "--texts", "no"], {"notes.txt"}),
        (["bench", ""], set(GROUPS)),
        (["generate", "x", "--dt"], {"--dtype"}),
        (["generate", "x", "--dtype", "f"], {"float16", "float32"}),
        (["generate", "x", "--no"], {"--no-report"}),
        (["train-gate", "x", "--kernel", "fl"], {"flex", "flash"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
        (["plan", "x", "--tokens", ""], set()),
    ],
)
def test_bash_completes_names(words: list[str], wanted: set[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "hub" / "models--org--model-a").mkdir(parents=True)
    (tmp_path / "script").write_text(script(Shell.bash, COMMANDS))
    done = subprocess.run(
        ["bash", "-c", BASH, "bash", str(tmp_path / "script"), "kvpolicy", *words],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "HF_HUB_CACHE": str(tmp_path / "hub")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert {line for line in done.stdout.split("\n") if line} == wanted


def test_a_shell_knows_every_option() -> None:
    group = typer.main.get_command(app)
    for function, name in zip(COMMANDS, NAMES, strict=True):
        found = {x for option in command_of(function, {}).options for x in option.names}
        params = group.commands[name].params
        options = [x for p in params for x in (*p.opts, *p.secondary_opts) if x.startswith("--")]
        assert found == {*options, "--help"}, name


def test_other_shells_have_the_same_names() -> None:
    assert call("completion", "zsh").stdout.endswith(call("completion", "bash").stdout)
    fish = call("completion", "fish").stdout
    for name in NAMES:
        assert f"-a {name} -d" in fish
    assert "'__fish_seen_subcommand_from plan' -l gate" in fish
    assert all(gate in fish for gate in GATES) and "eight needles" in fish
    assert call("completion", "tcsh", code=2)


def test_plan_shows_fractions_where_none_is_given(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    small_gate().save(tmp_path / "gate.safetensors")
    words = ("plan", tmp_path / "model", "--tokens", 5000, "--gate", tmp_path / "gate.safetensors")
    said = call(*words).stdout
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line}
    one = json.loads(call(*words, "--admitted", 0.25, "--json").stdout)
    assert rows["25%"][1] == f"{one['kept']:.1%}" and rows["25%"][-1] == f"{one['saving']:.0%}"
    assert "--admitted 0.25 plans for a quarter" in said and "kvpolicy inspect" in said
    wrong = call(*words, "--json", code=2).stderr
    assert "write admitted=0.25 for a quarter" in wrong
    in_full = call(*words, "--admitted", 0.25).stdout
    assert f"{one['pages']:,}" in in_full and "weights, gates and cache" in in_full


def test_plan_takes_a_fraction_beside_a_window(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    words = ("plan", tmp_path, "--tokens", 1000, "--admitted", 0.25, "--window", 64, "--json")
    assert json.loads(call(*words).stdout)["kept"] == (64 + 0.25 * 936) / 1000


def test_memory_that_runs_out_is_one_sentence(monkeypatch, capsys) -> None:
    import torch

    with pytest.raises(typer.Exit) as caught, common.errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And more")
    assert caught.value.exit_code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: memory: CUDA out of memory; ") and said.count("\n") == 1


def test_progress_is_quiet_elsewhere_than_on_a_terminal(capsys) -> None:
    for asked, wanted in ((None, []), (False, []), (True, ["loading", "cell 1 of 2: a", "cell 2"])):
        with Progress("cell", asked=asked) as shown:
            shown.doing("loading")
            shown.begin(2)
            shown.done(1, "a")
            shown.done(2, "b")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(wanted)
        assert all(line.startswith(w) for line, w in zip(lines, wanted, strict=True))


def test_progress_counts_what_earlier_runs_made(monkeypatch, capsys) -> None:
    now = iter([0.0, 0.0, 30.0])  # made, begun, six steps later
    monkeypatch.setattr("kvpolicy.cli.progress.time.monotonic", lambda: next(now))
    with Progress("step", asked=True) as shown:
        shown.begin(100, first=50)
        shown.done(60, "x")  # ten steps in 30 s: 40 more take two minutes
    assert capsys.readouterr().err == "step 60 of 100: x, 2:00 left\n"


@pytest.mark.parametrize(
    "name", ["calibrate", "pareto", "evaluate", "train-gate", "train-duo", "bench"]
)
def test_long_work_can_be_watched(name: str) -> None:
    assert re.search(r"--progress\s", call(name, "--help").stdout)
