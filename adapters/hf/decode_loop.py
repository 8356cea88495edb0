"""Our decoding loop, handed to generate as its decoding method."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from ...errors import UnsupportedError
from .cache import KVPolicyCache
from .capture import Stepper
from .lengths import ends_at
from .lockstep import Lockstep
from .own_steps import OwnSteps, aside, check_kept, why_own

RECORDS = ("hidden_states",)  # of every step's output, if generate is asked for them


def decode_loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    kvp_streamer: Any = None,
    kvp_cache: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Greedy or sampled decoding of `input_ids` `[B, S]`.

    transformers has validated and prepared everything. Sequences that have ended store nothing
    more. On a GPU the host looks at the stop flag one step late, so that it never waits for the
    device: the step launched meanwhile stores nothing and its token is dropped.
    """
    if kvp_cache is not None:
        model_kwargs["past_key_values"] = kvp_cache
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, KVPolicyCache):
        raise UnsupportedError(aside(model, "_prepare_cache_for_generation"))
    config, wanted = generation_config, generation_config.return_dict_in_generate
    scores: list[Tensor] | None = [] if wanted and config.output_scores else None
    raw: list[Tensor] | None = [] if wanted and config.output_logits else None
    if kvp_streamer is not None:
        kvp_streamer.put(input_ids.cpu())  # a streamer expects the prompt first
    asked = {n: getattr(config, f"output_{n}") for n in RECORDS if wanted}
    records = {n: how for n, how in asked.items() if how}
    reason = why_own(model, model_kwargs)
    if config.prefill_chunk_size == 1 and cache.phase == "decode":
        if reason:
            raise UnsupportedError(
                f"{reason}, so a question is no decoded tokens; ask it as a prompt"
            )
        output = _one_by_one(model, input_ids, config, model_kwargs)
    else:
        output = model._prefill(
            input_ids, config, model_kwargs, is_first_iteration=not config.is_assistant
        )
    check_kept(model, cache, output)
    if cache.phase == "prompt":
        cache.end_prompt()
    logits, recorded = output.logits, {name: [getattr(output, name)] for name in records}
    batch, prompt = input_ids.shape
    end = ends_at(stopping_criteria)
    room = max(end - prompt, 1)
    position = _next_position(model_kwargs, cache, input_ids.device)
    own = OwnSteps(model, cache, model_kwargs, output, reason) if reason else None
    stepper = Stepper(model, cache, position, room, records, own)
    ids = torch.zeros(batch, prompt + stepper.room + 1, dtype=torch.long, device=input_ids.device)
    ids[:, :prompt] = input_ids
    unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    # As in transformers, rows that another criterion than an EOS token stopped go on with the rest.
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = config._pad_token_tensor if ends else None
    going, wrong = torch.ones_like(unfinished), unfinished.new_zeros(())
    chosen = ids[:, -1]  # what streams get
    # A user's criterion may write another token than that into the ids it sees, to be read next.
    edits = _others(stopping_criteria)
    others = edits or _others(logits_processor)
    steps = Lockstep(cache.ranks, waits=not stepper.captured)
    late = _LateFlags(stepper.captured, kvp_streamer, steps)
    length = prompt

    def shown(call: Any, columns: int, *more: Any) -> Any:
        """What a call says of the ids so far, in memory of their own where others' code has them.

        They are a part of a buffer, whose rows do not follow each other.
        """
        part = ids[:, :columns]
        own = part.contiguous() if others else part
        found = call(own, *more)
        if own is not part:
            part.copy_(own)
        return found

    def choose() -> tuple[Tensor, Tensor]:
        """What follows `logits`: tokens that criteria have seen, and which sequences go on."""
        nonlocal wrong, chosen
        last = logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        processed = shown(logits_processor, length, last)
        token = _choose(processed, config.do_sample)
        if config.do_sample:
            wrong = ~processed.amax(-1).isfinite().all()
        if pad is not None:
            token = torch.where(unfinished, token, pad.to(token.device))
        ids[:, length] = chosen = token
        if scores is not None:
            scores.append(processed)
        if raw is not None:
            raw.append(last)
        seen = None if scores is None else tuple(scores)
        done = shown(stopping_criteria, length + 1, seen)
        if done.dtype != torch.bool:  # a criterion of whole numbers, of which the last bit counts
            done = (done & 1).bool()
        alive = unfinished & ~done
        return ids[:, length].clone() if edits else token, alive

    with experts(model):
        while True:
            token, alive = steps.decide(choose, batch)
            if cache.ranks.many:
                ids[:, length] = token
            length += 1
            stopped = late.stopped(alive, token if cache.ranks.many else chosen, wrong)
            if stopped or length >= end:
                break
            if length == ids.shape[1] - 1:
                stepper.make_room(end - length)
                ids = torch.cat([ids, ids.new_zeros(batch, stepper.room)], 1)
            # A row is active for the token that it sampled before it ended; none when all ended.
            logits = stepper.step(
                token, (unfinished if ends else going) & alive.any(), ids[:, :length]
            )
            for name in records:
                recorded[name].append(getattr(stepper.output, name))
            unfinished = alive
    extra = late.finish()
    length -= extra
    stepper.finish(extra)
    ids = ids[:, :length].clone(memory_format=torch.contiguous_format)
    if not wanted:
        return ids
    return GenerateDecoderOnlyOutput(
        # transformers annotates these as LongTensor and tuples of one.
        sequences=cast(Any, ids),
        scores=cast(Any, None if scores is None else tuple(scores[: len(scores) - extra])),
        logits=cast(Any, None if raw is None else tuple(raw[: len(raw) - extra])),
        past_key_values=cache,
        **{name: cast(Any, tuple(parts)) for name, parts in recorded.items()},
    )


def _others(calls: Any) -> bool:
    """Whether processors or criteria are not all of transformers."""
    return any(not type(x).__module__.startswith("transformers.") for x in calls)


def experts(model: Any) -> Any:
    """Decodes with the experts' implementation that transformers' own loop decodes with."""
    switch = getattr(model, "_optimize_model_for_decode", None)
    return contextlib.nullcontext() if switch is None else switch()


def _one_by_one(model: Any, input_ids: Tensor, config: Any, model_kwargs: dict[str, Any]) -> Any:
    """The last output after a question whose tokens are decoded, with evictions between them.

    transformers' own chunks take the cache to be empty, in 5.17 at least.
    """
    whole = {"input_ids": input_ids}
    for name in ("attention_mask", "position_ids"):
        if model_kwargs.get(name) is not None:
            whole[name] = model_kwargs[name][..., -input_ids.shape[1] :]
    for column in range(input_ids.shape[1]):
        part = {name: x[..., column : column + 1] for name, x in whole.items()}
        output = model(
            **part, past_key_values=model_kwargs["past_key_values"], use_cache=True,
            return_dict=True, output_hidden_states=config.output_hidden_states,
        )  # fmt: skip
    return output


def _choose(scores: Tensor, sample: bool) -> Tensor:
    if not sample:
        return scores.argmax(-1)
    # What torch.multinomial computes, which for its checks waits for the device.
    chances = scores.softmax(-1)
    return (chances / torch.empty_like(chances).exponential_()).argmax(-1)


def _next_position(
    model_kwargs: dict[str, Any], cache: KVPolicyCache, device: torch.device
) -> Tensor:
    """Position ids `[B, 1]` of the first generated token; `[n, B, 1]` where a token has several."""
    places: Tensor | None = model_kwargs.get("position_ids")
    given = not cache.counts_positions and not cache.counts_columns
    if places is not None and (places.ndim > 2 or given):
        return places[..., -1:] + 1
    assert cache.state is not None
    if cache.counts_columns:
        return torch.full((cache.state.batch, 1), cache.columns, device=device)
    first = cache.served.probe.first if cache.counts_own and cache.served is not None else 0
    return torch.tensor(cache.state.lengths, device=device)[:, None] + (first or 0)


class _LateFlags:
    """Tells the host that every sequence has ended, or could not be sampled, and streams tokens.

    With `late` both come through pinned memory one step after the device has them; without it the
    host waits.
    """

    def __init__(self, late: bool, streamer: Any, steps: Lockstep) -> None:
        self.late, self.streamer, self.steps = late, streamer, steps
        self.pending: tuple[Tensor, Tensor, Any] | None = None
        self.extra = 0

    def stopped(self, alive: Tensor, token: Tensor, wrong: Tensor) -> bool:
        """Whether all sequences had ended: now, or with `late` at the step before.

        Raises ValueError where scores were `wrong`.
        """
        if not self.late:
            going, bad = torch.stack([alive.any(), wrong]).tolist()
            self._put(token, bad)
            return not going
        before, self.pending = self.pending, self._send(alive, token, wrong)
        if before is None:
            return False
        if not self._receive(before):
            self.extra = 1
            self.pending = None
            return True
        return False

    def finish(self) -> int:
        """Ends the stream; the number of tokens that were sampled after everything had ended."""
        if self.pending is not None:
            self._receive(self.pending)
        self.steps.end()
        if self.streamer is not None:
            self.streamer.end()
        return self.extra

    def _send(self, alive: Tensor, token: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor, Any]:
        on = torch.cat([self.steps.flags(alive).long(), wrong[None].long()])
        flags = torch.empty(on.shape, dtype=on.dtype, pin_memory=True)
        flags.copy_(on, non_blocking=True)
        held = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
        held.copy_(token, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(token.device))
        return flags, held, event

    def _receive(self, sent: tuple[Tensor, Tensor, Any]) -> bool:
        flags, held, event = sent
        event.synchronize()
        *told, wrong = flags.tolist()
        alive = self.steps.look(told)
        self._put(held, bool(wrong))
        return alive

    def _put(self, token: Tensor, wrong: bool) -> None:
        if wrong:
            raise ValueError(
                "do_sample: a row's scores are infinite, no numbers or all ruled out, so that no "
                "token can be drawn; see what logits_processor and the bans among the options leave"
            )
        if self.streamer is not None:
            # A copy: a streamer may write into what it gets, and the token is read next.
            self.steps.kept(lambda: self.streamer.put(token.to("cpu", copy=True)))
