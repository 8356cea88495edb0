"""Runs that are killed, resumed, mixed up, shared by processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvpolicy.training import TrainingMix, WriteGates, train_duo_attention, train_write_gate
from tests.support.training.small import make_mix, make_model


def killed_at(index: int, mix: TrainingMix, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the stream dies at batch `index`."""
    batch = TrainingMix.batch

    def dying(self: TrainingMix, at: int, size: int, *, rank: int = 0):
        if at == index:
            raise KeyboardInterrupt
        return batch(self, at, size, rank=rank)

    monkeypatch.setattr(TrainingMix, "batch", dying)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(rows: list[dict]) -> list[dict]:
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def test_a_killed_gate_resumes_to_the_same_result(tmp_path, monkeypatch):
    mix = make_mix()
    options = {
        "steps": 6, "window": 8, "batch_size": 1, "target_keep": 0.3, "save_every": 2,
        "ungated": 9, "lr": 1e-2,
    }  # fmt: skip
    whole = train_write_gate(make_model(), mix, **options, out_dir=tmp_path / "a")
    with monkeypatch.context() as patch:
        killed_at(5, mix, patch)
        with pytest.raises(KeyboardInterrupt):
            train_write_gate(make_model(), mix, **options, out_dir=tmp_path / "b")
    assert [row["step"] for row in metrics(tmp_path / "b")] == [1, 2, 3, 4, 5]  # 4 are saved
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    again = train_write_gate(make_model(), mix, **options, out_dir=tmp_path / "b")
    for one, other in zip(whole.gates.parameters(), again.gates.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (whole.keep, whole.lam) == (again.keep, again.lam)
    runs = [without_time(metrics(tmp_path / name)) for name in "ab"]
    assert runs[0] == runs[1] and len(runs[0]) == 6


def test_a_killed_pattern_resumes_to_the_same_result(tmp_path, monkeypatch):
    mix = make_mix(length=400, kinds={"facts": 1.0})
    options = {"steps": 6, "sink_size": 2, "recent_size": 8, "lam": 10.0, "save_every": 2}
    whole = train_duo_attention(make_model(), mix, **options, out_dir=tmp_path / "a")
    with monkeypatch.context() as patch:
        killed_at(3, mix, patch)
        with pytest.raises(KeyboardInterrupt):
            train_duo_attention(make_model(), mix, **options, out_dir=tmp_path / "b")
    again = train_duo_attention(make_model(), mix, **options, out_dir=tmp_path / "b")
    assert torch.equal(whole.heads, again.heads) and whole.heads.std() > 0
    runs = [without_time(metrics(tmp_path / name)) for name in "ab"]
    assert runs[0] == runs[1] and len(runs[0]) == 6


def test_a_finished_run_stays_and_another_is_refused(tmp_path):
    options = {"steps": 2, "window": 8, "batch_size": 1, "out_dir": tmp_path}
    first = train_write_gate(make_model(), make_mix(), lam=0.1, **options)
    again = train_write_gate(make_model(), make_mix(), lam=0.1, **options)
    assert again.keep == first.keep
    with pytest.raises(ValueError, match="run of another lam: 0.1"):
        train_write_gate(make_model(), make_mix(), lam=0.2, **options)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_saved_gates_can_be_continued(suffix, tmp_path):
    model = make_model()
    trained = train_write_gate(model, make_mix(), steps=2, window=8, lam=0.1, expand=1.5)
    path = tmp_path / f"gate{suffix}"
    trained.save(path, dtype=torch.float32)
    loaded = WriteGates.load(path, model)
    for one, other in zip(trained.gates.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)
    if suffix == ".safetensors":
        other = make_model()
        other.model.layers[0].self_attn.k_proj.weight.data += 1
        with pytest.raises(ValueError, match="gate.safetensors: wanted gates of model"):
            WriteGates.load(path, other)
    with pytest.raises(ValueError, match=r"path: wanted a name ending in"):
        WriteGates.load(tmp_path / "gate.bin", model)


PROCESS = """
import torch
from tests.support.training.small import make_mix, make_model
from kvpolicy.training import train_write_gate
torch.set_num_threads(1)
out = {out!r}
trained = train_write_gate(
    make_model(), make_mix(), steps=3, window=8, lam=0.16, batch_size=1, lr=1e-2, out_dir=out
)
import os
torch.save(trained.gates.state_dict(), out + "/gates" + os.environ["RANK"])
from tests.support.two_ranks import end_at_once
torch.distributed.barrier()
end_at_once()
"""


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path):
    """Both end with the same gates: those of one process that takes both their sequences."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = PROCESS.format(out=str(tmp_path))
    root = str(Path(__file__).parents[2])
    shared = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true", "PYTHONPATH": root,
    }  # fmt: skip
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(2)
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    left, right = (torch.load(tmp_path / f"gates{r}") for r in range(2))

    class Both(TrainingMix):
        def batch(self, index: int, size: int, *, rank: int = 0):
            each = [super(Both, self).batch(index, 1, rank=r) for r in range(2)]
            return type(each[0])(*(torch.cat(parts) for parts in zip(*each, strict=True)))

    mix = make_mix()
    both = Both(texts=mix.texts, tokenizer=mix.tokenizer, length=mix.length)
    alone = train_write_gate(make_model(), both, steps=3, window=8, lam=0.16, lr=1e-2)
    for name, value in alone.gates.state_dict().items():
        assert torch.equal(left[name], right[name])
        torch.testing.assert_close(left[name], value, atol=1e-5, rtol=1e-4)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
