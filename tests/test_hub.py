"""What the project has on the hub, built without a network by .ci/hub/publish.py."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, dynamic_module_utils

import kvpolicy
from kvpolicy import (
    CachePipeline,
    DuoAttention,
    LocalAttention,
    Quest,
    Ratio,
    SnapKV,
    WriteGate,
    attach,
    new_cache,
    ops,
    pretrained,
)
from kvpolicy.evaluation.models.tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[1]


def module_at(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    return module_at(ROOT / ".ci" / "hub" / "publish.py", "publish")


@pytest.fixture(scope="module")
def built(publish, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    publish.build(out, "someone")
    return out


def test_cards_are_whole(built, publish):
    for folder, (name, _) in publish.REPOSITORIES.items():
        text = (built / folder / "README.md").read_text(encoding="utf-8")
        _, front, body = text.split("---\n", 2)
        assert yaml.safe_load(front)["license"] == "apache-2.0"
        assert f'"someone/{name}"' in body
        assert not {"{repository}", "{made}", "{version}"} & set(body.split())
        assert "{" not in body.replace("{docs}", "{")
        assert (built / folder / "LICENSE").is_file()
        for code in body.split("```python\n")[1:]:
            ast.parse(code.partition("```")[0])
    for folder in ("gates", "duo"):
        text = (built / folder / "README.md").read_text(encoding="utf-8")
        assert "Apache-2.0" in text and "King\nJames Bible" in text and "kvpolicy train-" in text


def test_gates_and_patterns_load_from_their_folders(built):
    for name, known in pretrained.KNOWN.items():
        (folder,) = {p.parent for p in built.rglob(next(iter(known.files)))}
        for file, digest in known.files.items():
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
        if pretrained.PATTERN in known.files:
            assert DuoAttention.from_pretrained(folder, sparsity=0.5).sparsity == 0.5
        else:
            assert WriteGate.from_pretrained(folder, f"{name}.safetensors").window == 64


@pytest.fixture
def generate_folder(built, tmp_path, monkeypatch) -> Path:
    """The custom_generate repository, and a place of its own for what transformers copies."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    # An installation from a checkout knows the version that it was installed with.
    real = importlib.metadata.version
    versions = {"kvpolicy": kvpolicy.__version__}
    monkeypatch.setattr(importlib.metadata, "version", lambda n: versions.get(n) or real(n))
    return built / "generate"


IDS = torch.arange(3, 67)[None] % 50


def plainly(model, pipeline: CachePipeline, **options) -> tuple[list, object]:
    with attach(model, pipeline) as attached:
        ids = model.generate(IDS, max_new_tokens=8, **options)
        return ids.tolist(), attached.last_report()


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize(
    ("asked", "pipeline"),
    [
        ({}, CachePipeline(eviction=SnapKV(budget=Ratio(0.5)))),
        ({"snapkv": 40}, CachePipeline(eviction=SnapKV(budget=40))),
        (
            {"quest": 48, "snapkv": 0.75},
            CachePipeline(selection=Quest(budget=48), eviction=SnapKV(budget=Ratio(0.75))),
        ),
        (
            {"pipeline": CachePipeline(admission=LocalAttention(sinks=2, window=16))},
            CachePipeline(admission=LocalAttention(sinks=2, window=16)),
        ),
    ],
)
def test_custom_generate_is_generate_while_attached(generate_folder, asked, pipeline, num_beams):
    model, reports = tiny_llama(), []
    wanted, says = plainly(model, pipeline, num_beams=num_beams)
    before = dict(vars(model)), model.config._attn_implementation
    ids = model.generate(
        IDS,
        max_new_tokens=8,
        num_beams=num_beams,
        custom_generate=str(generate_folder),
        trust_remote_code=True,
        report=reports.append,
        **asked,
    )
    assert ids.tolist() == wanted
    assert [r.total for r in reports] == [says.total]
    assert reports[0].evicted == says.evicted and reports[0].mean_admitted == says.mean_admitted
    assert (dict(vars(model)), model.config._attn_implementation) == before


def test_a_model_with_the_folder_attaches_on_load(generate_folder, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    shutil.copytree(generate_folder / "custom_generate", tmp_path / "model" / "custom_generate")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    pipeline = CachePipeline(eviction=SnapKV(budget=40))
    wanted, _ = plainly(model, pipeline)
    ours = loaded.generate
    for _ in range(2):
        assert loaded.generate(inputs=IDS, max_new_tokens=8, snapkv=40).tolist() == wanted
    assert loaded.generate is ours
    with pytest.raises(ValueError, match="pipeline: wanted it alone"):
        loaded.generate(inputs=IDS, pipeline=pipeline, snapkv=40)
    cache, reports = new_cache(loaded, pipeline), []
    loaded.generate(
        inputs=IDS,
        max_new_tokens=8,
        past_key_values=cache,
        pipeline=pipeline,
        report=reports.append,
    )
    assert reports[0].total == cache.report().total
    with pytest.raises(kvpolicy.UnsupportedError):
        loaded.generate(inputs=IDS, use_cache=False)
    assert loaded.generate is ours


def test_custom_generate_loads_gates_by_name(generate_folder, tmp_path, monkeypatch):
    module = module_at(generate_folder / "custom_generate" / "generate.py", "custom_generate")
    by_name = module._pipeline("smollm2-135m-instruct-w64-keep25", None, None).admission
    here = Path(pretrained.__file__).parent
    file = "smollm2-135m-instruct-w64-keep10.safetensors"
    by_file = module._pipeline((str(here), file), 96, None)
    assert by_name.window == by_file.admission.window == 64
    assert by_file.selection.budget.tokens == 96
    assert not torch.equal(by_name.w1, by_file.admission.w1)


def test_an_old_kvpolicy_is_named(generate_folder, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    with pytest.raises(ImportError, match=r"kvpolicy>=0\.2\.0 \(installed: 0\.1\.0\)"):
        tiny_llama().generate(IDS, custom_generate=str(generate_folder), trust_remote_code=True)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def variant(request, built) -> Path:
    return built / "kernels" / "build" / f"torch-{request.param}"


def test_kernel_package_describes_its_files(built, variant):
    general = tomllib.loads((built / "kernels" / "build.toml").read_text())["general"]
    says = json.loads((variant / "metadata.json").read_text())
    assert says["id"].isidentifier()
    assert (says["name"], says["version"]) == (general["name"], general["version"])
    assert f"torch-{says['backend']['type']}" == variant.name
    files = {p.relative_to(variant).as_posix(): p for p in variant.rglob("*.py")}
    assert says["digest"]["files"].keys() == files.keys()
    for name, digest in says["digest"]["files"].items():
        assert base64.b64decode(digest) == hashlib.sha256(files[name].read_bytes()).digest()
    source = built / "kernels" / "torch-ext" / "kvpolicy_kernels"
    assert {p.relative_to(source).as_posix() for p in source.rglob("*.py")} == files.keys()
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            top = getattr(node, "module", None) if isinstance(node, ast.ImportFrom) else None
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [top or ""]
            assert not any(
                n.split(".")[0] == "kvpolicy" for n in names if not getattr(node, "level", 0)
            )


def test_kernel_package_computes_what_the_library_does(variant, device):
    """Loaded as the package `kernels` does: by path, under its id."""
    says = json.loads((variant / "metadata.json").read_text())
    package = module_at(variant / "__init__.py", says["id"])
    heads, tokens, dim, hidden = 2, 37, 16, 24
    make = torch.Generator().manual_seed(3)
    shapes = [(heads, tokens, dim)] * 2 + [(dim,)] * 2 + [(heads, hidden, 2 * dim)]
    shapes += [(heads, hidden)] * 2 + [(heads,)]
    inputs = [torch.randn(*shape, generator=make).to(device) for shape in shapes]
    scores = package.write_gate(*inputs)
    assert torch.equal(scores, ops.write_gate(*inputs)) and scores.std() > 0.1
    for backend in ("reference", "triton"):
        mine = package.ops.load(backend)
        assert mine.write_gate.__module__.startswith(says["id"])
        assert torch.equal(mine.write_gate(*inputs), ops.load(backend).write_gate(*inputs))


def test_push_makes_four_repositories(publish, built, tmp_path, monkeypatch, capsys):
    calls = []

    class Api:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert publish.main([str(tmp_path / "out"), "--org", "someone"]) == 0
    assert not calls and "someone/kvpolicy-kernels (kernel): " in capsys.readouterr().out
    assert publish.main([str(tmp_path / "again"), "--org", "someone", "--push"]) == 0
    made = [(args[0], kwargs["repo_type"]) for name, args, kwargs in calls if name == "create_repo"]
    wanted = [(f"someone/{name}", kind) for name, kind in publish.REPOSITORIES.values()]
    assert made == wanted and len(made) == 4
    sent = [
        (kwargs["repo_id"], kwargs["repo_type"], kwargs["revision"])
        for name, _, kwargs in calls
        if name == "upload_folder"
    ]
    assert sent == [(*pair, None) for pair in wanted] + [(*wanted[-1], "v1")]
    with pytest.raises(SystemExit):
        publish.main([str(tmp_path / "out")])
