"""transformers' own server around an attached model, as docs/serving.md has it, without a port."""

from __future__ import annotations

import asyncio
import json

import pytest

from kvpolicy import CachePipeline, SnapKV, UnsupportedError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.models import SIZES, tiny
from tests.support.adapters.tokenizers import letters
from tests.support.adapters.versions import NEWEST

for needed in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(needed)
pytestmark = [pytest.mark.slow, NEWEST]
PROMPT = {"prompt": "the cat and a dog here", "max_tokens": 12, "temperature": 0}


@pytest.fixture
def server(tmp_path, monkeypatch):
    from transformers.cli.serve import Serve

    tiny().save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(Serve, "start_server", lambda self: None)

    def made(**options):
        given = {"device": "cpu", "dtype": "float32", "log_level": "error", **options}
        return Serve(force_model=str(tmp_path / "model"), port=8000, non_blocking=True, **given)

    return made


def model_of(server):
    (loaded,) = server._model_manager.loaded_models.values()
    return loaded.model


def asked(server, **more):
    """The text of one completion, streamed or whole."""
    body = {"model": server._model_manager.force_model, **PROMPT, **more}

    async def run():
        answer = await server._completion_handler.handle_request(body, "request")
        if not more.get("stream"):
            return json.loads(answer.body)["choices"][0]["text"]
        lines = "".join([part async for part in answer.body_iterator]).splitlines()
        parts = [json.loads(x.removeprefix("data: ")) for x in lines if x.startswith("data: {")]
        return "".join(part["choices"][0]["text"] for part in parts if part["choices"])

    return asyncio.run(run())


def test_completions_go_through_the_pipeline(server):
    served = server()
    plain = asked(served)
    stop = plain[4:6]
    ended, streamed = asked(served, stop=[stop]), asked(served, stream=True)
    assert ended != plain and streamed == plain
    with attach(model_of(served), CachePipeline(window=5), **SIZES) as attached:
        assert asked(served) == plain
        assert attached.last_report().tokens > 0
        assert asked(served, stop=[stop]) == ended
        assert asked(served, stream=True) == plain
    few = CachePipeline(eviction=SnapKV(budget=6, observation=2), window=2)
    with attach(model_of(served), few, **SIZES) as attached:
        asked(served)
        assert sum(map(sum, attached.last_report().evicted)) > 0


def test_what_that_server_asks_besides_is_refused(server):
    for options, error, says in (
        ({"compile": True}, UnsupportedError, "^cache_implementation: not beside"),
        ({"continuous_batching": True}, ValueError, "kvpolicy is not supported"),
    ):
        served = server(**options)
        with attach(model_of(served), CachePipeline(window=5)), pytest.raises(error, match=says):
            asked(served)
