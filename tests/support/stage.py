"""Tiny things in place of downloads, so that what the documentation shows runs as it stands."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import kvpolicy.evaluation.models
import kvpolicy.pretrained
from kvpolicy import WriteGate
from kvpolicy.admission._duo_file import CONFIG, PATTERN
from kvpolicy.evaluation.models import tiny_llama

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of characters with a chat template."""
    letters = Tokenizer(models.WordLevel({chr(n): n for n in range(256)}, unk_token=chr(1)))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters,
        unk_token=chr(1),
        pad_token=chr(0),
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_gate(path: Path) -> Path:
    """The file of a gate for the tiny model, which admits some tokens."""
    torch.manual_seed(0)
    gate = WriteGate(
        norm_pre=torch.ones(2, 32),
        norm_post=torch.ones(2, 32),
        w1=torch.randn(2, 2, 16, 64) / 4,
        b1=torch.zeros(2, 2, 16),
        w2=torch.randn(2, 2, 16),
        b2=torch.full((2, 2), -2.0),
        **({"window": 64} if path.suffix == ".safetensors" else {}),
    )
    gate.save(path)
    return path


def tiny_pattern(folder: Path) -> Path:
    """The folder of a DuoAttention pattern for the tiny model."""
    folder.mkdir(exist_ok=True)
    (folder / PATTERN).write_text("0.9\t0.1\n0.2\t0.8\n")
    (folder / CONFIG).write_text('{"sink_size": 4, "recent_size": 64}')
    return folder


def set_stage(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """Makes every loader give the tiny model, gate and pattern; returns the model."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    original, downloads = transformers.pipeline, folder / "downloads"
    downloads.mkdir()

    def pipeline(task: str, name: str, **options: Any) -> Any:
        return original(task, model=model, tokenizer=tokenizer, **options)

    def shipped(name: str) -> Path:
        if name.startswith("duo"):
            return tiny_pattern(downloads / name)
        return tiny_gate(downloads / f"{name}.safetensors")

    def download(repo: str, file: str, **options: Any) -> str:
        return str(tiny_gate(downloads / file))

    def loaded(*args: Any, **options: Any) -> Any:
        return model, tokenizer

    loaders = {
        "AutoModelForCausalLM": model,
        "AutoTokenizer": tokenizer,
        "AutoConfig": model.config,
    }
    for name, thing in loaders.items():
        patch.setattr(
            getattr(transformers, name), "from_pretrained", lambda *a, _thing=thing, **k: _thing
        )
    patch.setattr(transformers, "pipeline", pipeline)
    patch.setattr(kvpolicy.evaluation.models, "load_smollm2", loaded)
    patch.setattr(kvpolicy.pretrained, "path", shipped)
    patch.setattr(huggingface_hub, "hf_hub_download", download)
    patch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: str(tiny_pattern(downloads / "duo"))
    )
    if all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))):
        from transformers.cli.serving.model_manager import ModelManager

        patch.setattr(ModelManager, "_load_model", lambda *a, **k: model)
        patch.setattr(ModelManager, "_load_processor", lambda *a, **k: tokenizer)
    patch.chdir(folder)
    Path("book.txt").write_text("It was a dark and stormy night. " * 20, encoding="utf-8")
    return model
