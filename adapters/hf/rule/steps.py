"""How decode steps of a type run with a pipeline: captured or not, compiled or not."""

from __future__ import annotations

from typing import Any

import torch

from ....errors import UnsupportedError
from ....pipeline import CachePipeline
from ..attach import attach
from ..compile import traced

PROMPT, NEW = 27, 12  # tokens; windows and chunks of tiny models are shorter
NOT_CHECKED = "not checked"
_GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def captured(model: Any) -> str:
    """Whether `generate` captures a tiny model's steps, or what prevents it; not without a GPU."""
    if not torch.cuda.is_available():
        return NOT_CHECKED
    model = model.cuda()
    wanted = _generated(model)
    with attach(model, CachePipeline(window=5), page_size=4) as attached:
        found = _generated(model)
        how = attached.decoding
    return _same(found, wanted, "yes" if how == "captured" else _short(how))


def compiled(model: Any) -> str:
    """Whether dynamo traces a layer of a tiny model whole, or what prevents it."""
    wanted = _generated(model)
    try:
        with traced(), attach(model, CachePipeline(window=5), compile=True, page_size=4):
            return _same(_generated(model), wanted, "yes")
    except UnsupportedError as error:
        return f"no: {str(error).rpartition('cannot be compiled: ')[2]}"
    except torch._dynamo.exc.TorchDynamoException as error:
        return f"no: {_short(str(error))}"


@torch.no_grad()
def _generated(model: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 60, (1, PROMPT), generator=draw).to(model.device)
    out: torch.Tensor = model.generate(input_ids=ids, **_GREEDY)
    return out


def _same(found: torch.Tensor, wanted: torch.Tensor, said: str) -> str:
    return said if torch.equal(found, wanted) else f"{said}, but other tokens"


def _short(text: str) -> str:
    """Its first line."""
    line = " ".join((text.strip().splitlines() or [""])[0].split())
    return line.replace("eager: ", "no: ", 1)
