"""Ranks that share a model fail together and see that they agree."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import torch
import torch.distributed as dist

from kvpolicy import Admission, CachePipeline, CapacityError, KVPolicyError, UnsupportedError
from kvpolicy.adapters.hf import alarm, attach, load_cache
from kvpolicy.adapters.hf.rank_files import own_file, read_index
from kvpolicy.adapters.hf.ranks import Ranks
from tests.support.adapters.models import SIZES, prompt, tiny

ROOT = Path(__file__).resolve().parents[2]


class Scripted(Ranks):
    """Rank 0 of two; `other` holds rank 1's code at each vote, and its key where that differs."""

    def __init__(self, other=()):
        super().__init__(mesh=SimpleNamespace(get_local_rank=lambda axis: 0, device_type="cpu"))
        self.other, self.codes = list(other), []

    def _highest(self, code, key):
        self.codes.append(code)
        other, its = self.other.pop(0) if self.other else (0, None)
        its = int(key) if its is None else its
        return max(code, other), max(int(key), its), max(-int(key), -its)

    parts = 2

    def listen(self):
        pass

    def _gathered(self, x, into):
        return [x, x]

    def objects(self, own):
        self.vote()
        return [own, own]

    def same(self, x):
        self.vote()
        return x


FAILED, FULL, OTHER = (3, None), (4, None), (0, 12345)
FINE = (0, None)


@attrs.frozen(kw_only=True)
class Failing(Admission):
    """Fails at the layers named."""

    fails: list = attrs.field(factory=list)
    window: int | None = 5

    def admit(self, write):
        if write.layer in self.fails:
            raise MemoryError(f"layer {write.layer}")
        return torch.ones(len(write.heads), len(write.positions), dtype=torch.bool)


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def ranks(monkeypatch):
    found = Scripted()
    monkeypatch.setattr("kvpolicy.adapters.hf.cache.ranks_of", lambda model: found)
    return found


def state(cache):
    return cache.columns, list(cache.state.lengths), cache.report().kv


@pytest.mark.parametrize("before", [0, 1], ids=["at its beginning", "at its end"])
@pytest.mark.parametrize(
    ("other", "kind", "says"),
    [
        (FAILED, KVPolicyError, "rank 1 of .* failed"),
        (FULL, CapacityError, "rank 1 of .* no room"),
        (OTHER, UnsupportedError, "different tokens"),
    ],
)
def test_the_failure_of_another_rank_takes_a_forward_back(model, ranks, before, other, kind, says):
    ids, tail = prompt([20])["input_ids"], prompt([7], seed=2)["input_ids"]
    with attach(model, CachePipeline(admission=Failing()), **SIZES) as attached, torch.no_grad():
        cache = attached.read(ids)
        copy, was = cache.fork(), state(cache)
        cache.begin_prompt()
        copy.begin_prompt()
        ranks.other = [FINE] * before + [other]
        with pytest.raises(kind, match=says):
            model(tail, past_key_values=cache)
        assert state(cache) == was
        logits = [model(tail, past_key_values=each).logits for each in (cache, copy)]
    assert torch.equal(*logits)


def test_a_layer_that_fails_is_told_when_the_others_have_run(model, ranks):
    ids, tail = prompt([20])["input_ids"], prompt([7], seed=2)["input_ids"]
    ran = []
    model.model.layers[1].mlp.register_forward_hook(lambda *args: ran.append(1))
    pipeline = CachePipeline(admission=Failing())
    with attach(model, pipeline, **SIZES) as attached, torch.no_grad():
        cache = attached.read(ids)
        was = state(cache)
        pipeline.admission.fails.append(0)
        cache.begin_prompt()
        ranks.codes.clear()
        ran.clear()
        with pytest.raises(MemoryError, match="layer 0"):
            model(tail, past_key_values=cache)
        assert ran == [1]
        assert ranks.codes == [0, 1]  # opened, then told once
        assert state(cache) == was
        pipeline.admission.fails.clear()
        model(tail, past_key_values=cache)


def test_an_error_between_forwards_meets_the_next_vote_of_the_others(model, ranks):
    def breaks(ids, scores):
        raise ValueError("processor")

    with attach(model, CachePipeline(admission=Failing()), **SIZES):
        with pytest.raises(ValueError, match="processor"):
            model.generate(**prompt([9]), logits_processor=[breaks], max_new_tokens=3)
        assert ranks.codes[-1] == 1
        assert ranks.codes.count(1) == 1
        ranks.codes.clear()
        with pytest.raises(CapacityError, match="rank 1"):
            ranks.other = [FULL]
            model.generate(**prompt([9]), max_new_tokens=3)
        assert ranks.codes == [0]  # what all know is not told again


def test_an_error_of_the_models_own_code_ends_this_rank(model, ranks):
    def fail(*args):
        raise MemoryError("mlp")

    with attach(model, CachePipeline(admission=Failing()), **SIZES) as attached:
        cache = attached.new_cache()
        hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError, match="mlp"):
            model.generate(**prompt([9]), past_key_values=cache, max_new_tokens=2)
        hook.remove()
        assert cache.columns == 0
        votes = len(ranks.codes)
        with pytest.raises(KVPolicyError, match="rank 0 .* end all processes"):
            model.generate(**prompt([9]), past_key_values=cache, max_new_tokens=2)
        assert len(ranks.codes) == votes


class Rank:
    """Counts how often it was told that another one broke off."""

    def __init__(self):
        self.met, self.told = threading.Event(), 0

    def broken(self):
        self.told += 1
        self.met.set()


def test_an_alarm_reaches_a_rank_that_waits_in_a_kernel(monkeypatch):
    store, here, there = dist.HashStore(), Rank(), Rank()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(alarm, "PERIOD", 0.01)
    mesh = SimpleNamespace(
        device_type="cuda", get_group=lambda axis: SimpleNamespace(group_name="heads")
    )
    own, other = alarm.Alarm(mesh, 0), alarm.Alarm(mesh, 0)
    assert own.rung() is None
    own.listen(0, here.broken)
    other.listen(1, there.broken)
    alone = Rank()
    alarm.Alarm(mesh, 0).listen(2, alone.broken)
    del alone
    other.ring(1)
    own.ring(0)  # too late
    assert here.met.wait(20) and own.rung() == other.rung() == 1
    for thread in threading.enumerate():
        if thread.name == "kvpolicy-alarm":
            thread.join(20)
            assert not thread.is_alive()
    assert (here.told, there.told) == (1, 0)


LISTENS = """
import types
import torch.distributed as dist
from kvpolicy.adapters.hf import alarm
class Rank:
    def broken(self): pass
alarm.PERIOD, rank = 0.0, Rank()
store = dist.TCPStore("127.0.0.1", 0, 1, True)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
group = types.SimpleNamespace(group_name="heads")
mesh = types.SimpleNamespace(device_type="cuda", get_group=lambda axis: group)
own = alarm.Alarm(mesh, 0)
own.listen(0, rank.broken)
while own.rung() is None:
    own.store.add("looks", 1)
    if own.store.add("looks", 0) > 200:
        break
del store
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_process_that_listens_ends_well():
    runs = [
        subprocess.Popen([sys.executable, "-c", LISTENS], stderr=subprocess.PIPE) for _ in range(6)
    ]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0] * 6, said


def test_a_rank_that_another_one_left_runs_nothing_more(model, ranks):
    with attach(model, CachePipeline(admission=Failing()), **SIZES) as attached:
        cache = attached.read(prompt([9])["input_ids"])
        votes, was = len(ranks.codes), state(cache)
        ranks.left, ranks.first = True, 1
        for call in (
            lambda: model(prompt([1])["input_ids"], past_key_values=cache),
            lambda: attached.ask(cache, prompt([3])["input_ids"], max_new_tokens=2),
            lambda: cache.report(all_ranks=True),
            cache.fork,
        ):
            with pytest.raises(KVPolicyError, match="rank 1 .* broke off inside a forward"):
                call()
        assert len(ranks.codes) == votes and state(cache) == was


def test_a_key_tells_tokens_and_their_order(ranks):
    def key(*ids):
        return int(ranks.key({"input_ids": torch.tensor([ids])}))

    assert key(5, 6) == key(5, 6)
    assert len({key(5, 6), key(6, 5), key(5, 7), key(5), key(5, 6, 0)}) == 5


def test_a_process_alone_exchanges_nothing(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("an exchange")

    monkeypatch.setattr(dist, "all_reduce", fail)
    monkeypatch.setattr(dist, "broadcast", fail)
    alone, token = Ranks(), torch.tensor([3])
    alone.vote(key=4)
    assert alone.same(token) is token
    assert alone.key({"input_ids": token}) == 1  # nothing is computed
    state = torch.get_rng_state()
    with alone.one_seed(token.device), alone.together():
        assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyError), alone.together():
        raise KeyError


def test_a_save_that_another_rank_cannot_finish_leaves_the_earlier_one(model, ranks, tmp_path):
    path = tmp_path / "cache"
    with attach(model, CachePipeline(admission=Failing()), **SIZES) as attached:
        cache = attached.read(prompt([9])["input_ids"])
        cache.save(path)
        before = {x.name: x.read_bytes() for x in tmp_path.iterdir()}
        assert len(before) == 2 and read_index(path)[1] == 2
        ranks.other = [FINE, FAILED]
        with pytest.raises(KVPolicyError, match="rank 1"):
            cache.save(path)
        assert before == {x.name: x.read_bytes() for x in tmp_path.iterdir()}
        ranks.other = []
        cache.save(path)
        assert own_file(path, ranks).is_file()
        assert before.keys() & {x.name for x in tmp_path.iterdir()} == {"cache"}


def test_a_file_is_loaded_on_as_many_ranks_as_wrote_it(model, tmp_path, monkeypatch):
    pipeline, two = CachePipeline(admission=Failing()), Scripted()
    with attach(model, pipeline, **SIZES) as attached:
        cache = attached.read(prompt([9])["input_ids"])
        cache.save(tmp_path / "one")
        cache.ranks = two
        cache.save(tmp_path / "two")
    with pytest.raises(UnsupportedError, match="saved by 2 ranks .* this model is on 1"):
        load_cache(model, pipeline, tmp_path / "two", **SIZES)
    monkeypatch.setattr("kvpolicy.adapters.hf.cache.ranks_of", lambda model: two)
    with pytest.raises(UnsupportedError, match="saved by one process, this model is on 2"):
        load_cache(model, pipeline, tmp_path / "one", **SIZES)
    with pytest.raises(FileNotFoundError):
        load_cache(model, pipeline, tmp_path / "none", **SIZES)
    assert load_cache(model, pipeline, tmp_path / "two", **SIZES).columns == 9
    for text in ("", "{}", '{"format": "kvpolicy-ranks-1", "key": "../x", "ranks": 2}'):
        (tmp_path / "two").write_text(text)
        assert read_index(tmp_path / "two") is None


def test_a_report_of_all_ranks_has_each_one_s(model, ranks):
    with attach(model, CachePipeline(admission=Failing()), **SIZES) as attached:
        cache = attached.read(prompt([20])["input_ids"])
        own, every = cache.report(), cache.report(all_ranks=True)
        assert every.kv == 2 * own.kv and every.tokens == own.tokens == 20
        assert every.stored == [2 * layer for layer in own.stored]
        assert every.ranks == [own, own] and not own.ranks
        assert "rank 1" in str(every) and "rank 1" not in str(own)
        model.generate(**prompt([9]), max_new_tokens=2)
        assert len(attached.last_report().ranks) == 2
        ranks.other = [FAILED]
        with pytest.raises(KVPolicyError, match="rank 1"):
            cache.report(all_ranks=True)
