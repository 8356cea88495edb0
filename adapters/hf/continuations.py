"""Log-probabilities of many continuations: contexts are read once, continuations are decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from .attached import Attached
from .cache import KVPolicyCache
from .own_steps import check_put_aside
from .phases import one_by_one, read
from .tiles import refuse_whole

Ids = tuple[int, ...]
COLUMNS = 128  # of a forward: bounds what the logits take


@attrs.frozen
class Continued:
    """What follows a context: `n` tokens, the last of them left open.

    `chosen` `[n - 1]` are log-probabilities of the others, `best` `[n]` the tokens that greedy
    decoding would have taken, `last` `[vocabulary]` the log-probabilities of the last one.
    """

    chosen: Tensor
    best: Ids
    last: Tensor


def continued(
    attachment: Attached,
    rows: Sequence[tuple[Ids, Ids]],
    dtype: torch.dtype | None = None,
    read_to: Callable[[KVPolicyCache], None] = lambda cache: None,
) -> list[Continued]:
    """For each context and the tokens that follow it: what the model makes of them and of one more.

    As `Attachment.loglikelihood`: the prompt ends, and evictions act, before a context's last
    token, which is decoded as what follows it is. Rows of one context share its pages. A context of
    one token has no prompt. `dtype` is that of the softmax, by default the logits'; `read_to` is
    called with a cache whose prompts have ended, if there were any.
    """
    refuse_whole(attachment, "loglikelihood")
    found: dict[int, Continued] = {}
    for without in (False, True):
        some = [n for n, (context, _) in enumerate(rows) if (len(context) == 1) == without]
        if some:
            picked = [rows[n] for n in some]
            cache = attachment.cache_for(None) if without else _read(attachment, picked, read_to)
            if without:
                cache.moved = [None for _ in attachment.forwards.moving]
            asked = [(*context[-1:], *more) for context, more in picked]
            found |= zip(some, _decoded(attachment, cache, asked, dtype), strict=True)
            if without:
                read_to(cache)
    return [found[n] for n in range(len(rows))]


def _read(
    attachment: Attached,
    rows: Sequence[tuple[Ids, Ids]],
    read_to: Callable[[KVPolicyCache], None],
) -> KVPolicyCache:
    """A cache with a sequence for each row, which has read all but its context's last token."""
    contexts = list(dict.fromkeys(context for context, _ in rows))
    ids, mask = _padded([context[:-1] for context in contexts], attachment.base.device, left=True)
    longest = max(len(context) + len(more) for context, more in rows) - 1
    check_put_aside(attachment.base, attachment.put_aside, 0, ids.shape[1], longest)
    cache = read(attachment, ids, mask, None, None, None)
    read_to(cache)
    of = [contexts.index(context) for context, _ in rows]
    return cache if of == [*range(len(contexts))] else cache.fork(of)


def _decoded(
    attachment: Attached, cache: KVPolicyCache, asked: list[Ids], dtype: torch.dtype | None
) -> list[Continued]:
    ids, valid = _padded(asked, attachment.base.device, left=False)
    width = 1 if one_by_one(attachment) else COLUMNS
    before = cache.real().to(valid) if cache.columns else valid[:, :0]
    mask = torch.cat([before, valid], 1)
    targets = F.pad(ids[:, 1:], (0, 1))
    ends = valid.sum(1) - 1  # column whose logits are those of the token left open
    chosen, best, last = [], [], {}
    with torch.no_grad(), attachment.forwards.holding():
        cache.begin_question(None)
        for start in range(0, ids.shape[1], width):
            part = slice(start, start + width)
            logits = attachment.base(
                input_ids=ids[:, part],
                attention_mask=mask[:, : before.shape[1] + start + width],
                past_key_values=cache,
                return_dict=True,
            ).logits
            scores = F.log_softmax(logits, -1, dtype=dtype)
            chosen.append(scores.gather(-1, targets[:, part, None]).squeeze(-1))
            best.append(scores.argmax(-1))
            for row, end in enumerate(ends.tolist()):
                if start <= end < start + width:
                    last[row] = scores[row, end - start].clone()
    attachment.used(cache)
    every, taken = torch.cat(chosen, 1), torch.cat(best, 1).tolist()
    return [
        Continued(every[row, : len(one) - 1], tuple(taken[row][: len(one)]), last[row])
        for row, one in enumerate(asked)
    ]


def _padded(rows: Sequence[Ids], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, S]`, padded to the longest at the left or right."""
    width = max(map(len, rows))
    filled = [[0] * (width - len(row)) for row in rows]
    pairs = list(zip(rows, filled, strict=True))
    ids = [[*pad, *row] if left else [*row, *pad] for row, pad in pairs]
    real = [[0] * len(pad) + [1] * len(row) for row, pad in pairs]
    mask = real if left else [line[::-1] for line in real]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
