"""Caches in which some layers keep a recurrent or convolutional state, beside plain text alone."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, RollbackError, UnsupportedError
from kvpolicy.adapters.hf import attach, load_cache
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from kvpolicy.store import clear, move, park, side_state, unpark
from tests.support.adapters.models import tiny

# States beside attention layers, convolutions, and both in one layer.
KINDS = ("qwen3_5_text", "granitemoehybrid", "lfm2", "falcon_h1")
PIPELINE = CachePipeline(window=5)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
IDS = torch.randint(20, 60, (2, 24), generator=torch.Generator().manual_seed(3))


def logits(model, ids):
    """Plain logits `[B, V]` after `ids`."""
    return model(input_ids=ids, use_cache=False).logits[:, -1]


def after(model, cache, ids):
    """Logits `[B, V]` after `ids` on a cache."""
    return model(input_ids=ids, past_key_values=cache).logits[:, -1]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.std()))


@pytest.fixture(params=KINDS)
def model(request):
    return tiny_model(request.param).eval()


def test_forks_go_their_own_way(model):
    with torch.no_grad():
        wanted = [logits(model, torch.cat([IDS[:, :20], x], 1)) for x in (IDS[:, 20:], IDS[:, 4:8])]
        swapped = logits(model, torch.cat([IDS[:, :20].flip(0), IDS[:, 20:]], 1))
        with attach(model, PIPELINE, page_size=4) as attached:
            cache = attached.read(IDS[:, :20])
            fork, other = cache.fork(), cache.fork([1, 0])
            close(after(model, cache, IDS[:, 20:]), wanted[0])
            close(after(model, fork, IDS[:, 4:8]), wanted[1])
            close(after(model, other, IDS[:, 20:]), swapped)
            assert cache.report().states > 0 and cache.report().total > cache.report().states


def test_rows_are_selected_in_place(model):
    with torch.no_grad():
        wanted = logits(model, torch.cat([IDS[[1, 1, 0], :20], IDS[[0, 1, 0], 20:]], 1))
        with attach(model, PIPELINE, page_size=4) as attached:
            cache = attached.read(IDS[:, :20])
            cache.batch_select_indices(torch.tensor([1, 1, 0]))
            close(after(model, cache, IDS[[0, 1, 0], 20:]), wanted)


def test_slots_are_filled_parked_and_resumed(model):
    """Sequences read alone decode in a room that is filled while one of them waits elsewhere."""
    with torch.no_grad():
        wanted = logits(model, IDS)
        with attach(model, PIPELINE, page_size=4) as attached:
            room = attached.new_cache()
            state, states = room.ensure_state(2), room.states
            for row in (0, 1):
                side = attached.new_cache()
                side.take_state(side_state(state))
                after(model, side, IDS[row : row + 1, :20])
                side.end_prompt()
                if row:
                    parked = park(state, 0), states.park(0)
                move(state, 0, side.state, 0)
                states.move(0, side.states, 0, 2)
                assert not side.states.begun
            at = [x.data_ptr() for _, x in states._tensors()]
            unpark(state, 1, parked[0])
            states.put(1, parked[1], 2)
            assert [x.data_ptr() for _, x in states._tensors()] == at
            room.saw(20, None)
            room.end_prompt()
            close(after(model, room, IDS[[1, 0], 20:]), wanted[[1, 0]])
            clear(state, [0, 1])
            states.clear([0, 1])
            assert not states.begun and not any(x.any() for _, x in states._tensors())


def test_files_hold_states(model, tmp_path):
    with torch.no_grad():
        wanted = logits(model, IDS)
        with attach(model, PIPELINE, page_size=4) as attached:
            cache = attached.read(IDS[:, :20])
            cache.save(tmp_path / "cache")
            loaded = load_cache(model, PIPELINE, tmp_path / "cache", page_size=4)
            close(after(model, loaded, IDS[:, 20:]), wanted)
            with pytest.raises(ValueError, match="wanted states of layers .*, got those of none"):
                attached.new_cache().states.from_tensors({}, 2, lambda place: torch.device("cpu"))


def test_a_forward_that_fails_leaves_them(model):
    layer = model.get_submodule(attach_name(model))

    def fails(*args):
        raise MemoryError("on purpose")

    with torch.no_grad():
        wanted = logits(model, IDS)
        with attach(model, PIPELINE, page_size=4) as attached:
            for start in (0, 20):  # the first forward, and a later one
                cache = attached.new_cache()
                if start:
                    after(model, cache, IDS[:, :start])
                hook = layer.register_forward_hook(fails)
                with pytest.raises(MemoryError):
                    after(model, cache, IDS[:, start : start + 3])
                hook.remove()
                close(after(model, cache, IDS[:, start:]), wanted)


def attach_name(model):
    """The last attention module: layers with states have run before it."""
    with attach(model, PIPELINE) as attached:
        module = attached.served.layers[-1].module
        return next(name for name, x in model.named_modules() if x is module)


def test_beams(model):
    options = {**GREEDY, "num_beams": 3}
    wanted = model.generate(input_ids=IDS, **options)
    with attach(model, PIPELINE, page_size=4):
        assert torch.equal(model.generate(input_ids=IDS, **options), wanted)


def test_a_cache_is_emptied(model):
    with torch.no_grad():
        wanted = logits(model, IDS)
        with attach(model, PIPELINE, page_size=4) as attached:
            cache = attached.read(IDS.flip(1))
            cache.reset()
            close(after(model, cache, IDS), wanted)


def test_inference_mode_and_back(model):
    with torch.no_grad():
        wanted = logits(model, IDS)
    with attach(model, PIPELINE, page_size=4) as attached:
        with torch.inference_mode():
            cache = attached.new_cache()
            after(model, cache, IDS[:, :20])
        with torch.no_grad():
            close(after(model, cache, IDS[:, 20:]), wanted)


def test_what_cannot_be_undone_is_refused(model):
    ids, mask = IDS[:, :12], torch.ones(2, 12, dtype=torch.long)
    right = mask.clone()
    right[0, -3:] = 0
    with torch.no_grad():
        places = torch.arange(12).remainder(6).expand(2, -1)
        plain = model(input_ids=ids, position_ids=places, use_cache=False).logits
    with attach(model, PIPELINE, page_size=4) as attached, torch.no_grad():
        cache = attached.read(ids)
        with pytest.raises(RollbackError, match="recurrent or convolutional state"):
            cache.crop(-1)
        with pytest.raises(UnsupportedError, match="after a sequence's first token"):
            model(input_ids=ids, attention_mask=right)
        for name, value in (("prompt_lookup_num_tokens", 2), ("assistant_model", tiny())):
            with pytest.raises(UnsupportedError, match=f"^{name}: .* states of"):
                model.generate(input_ids=ids[:1], **{name: value}, **GREEDY)
        hidden = torch.cat([mask, mask[:, :3]], 1)
        hidden[0, 12] = 0
        with pytest.raises(UnsupportedError, match="hides columns after the first forward"):
            model(input_ids=IDS[:, 12:15], attention_mask=hidden, past_key_values=cache)
        if attached.served.probe.apart:
            with pytest.raises(UnsupportedError, match="several texts"):
                model(input_ids=ids, position_ids=places, use_cache=False)
        else:  # the model's own masks do not separate them either
            found = model(input_ids=ids, position_ids=places, use_cache=False).logits
            torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)


def test_a_turn_after_rows_of_two_lengths_is_refused(model):
    free = model.generate(input_ids=IDS[:, :12], **GREEDY)
    end = int(free[0, 14])
    if end in free[1, 12:].tolist():
        pytest.skip("both rows say it")
    with attach(model, PIPELINE, page_size=4) as attached:
        cache = attached.new_cache()
        options = {**GREEDY, "eos_token_id": end}
        said = model.generate(input_ids=IDS[:, :12], past_key_values=cache, **options)
        assert torch.equal(said, free) is False
        cache.begin_prompt()
        with torch.no_grad(), pytest.raises(UnsupportedError, match="had ended"):
            model(input_ids=IDS[:, :3], past_key_values=cache)


@pytest.mark.parametrize("name", ["jamba", "lfm2"])
@torch.no_grad()
def test_a_decoder_without_its_head(name):
    model, ids = tiny_model(name).model, torch.arange(2, 14)[None]
    plain = model(ids).last_hidden_state
    with attach(model, CachePipeline()):
        assert torch.allclose(model(ids).last_hidden_state, plain, atol=1e-4)
