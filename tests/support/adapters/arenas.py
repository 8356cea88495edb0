"""A model of vLLM's scheduler: requests that come and go over blocks, and an oracle for each."""

from __future__ import annotations

from collections import deque

import torch

from kvpolicy import AdmitAll, CacheSpec, DuoAttention, LocalAttention
from kvpolicy.adapters.vllm.plan import plan_of
from kvpolicy.adapters.vllm.prompt_end import Ends, end_prompt, hear, parts_of
from kvpolicy.adapters.vllm.reading import read_prompt
from kvpolicy.adapters.vllm.rows import Rows
from kvpolicy.budget import budget_of
from kvpolicy.ops import POSITION_MASK
from tests.support import rules
from tests.support.oracle import Oracle

SPEC = CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, rollback=0)
LONGEST = 200


class Request:
    """Tokens of one request, how many are computed, and its blocks.

    The first `prompt` tokens are its prompt, if somebody evicts at its end.
    """

    def __init__(self, pipeline, length, seed, spec=SPEC, prompt=None):
        draw = torch.Generator().manual_seed(seed)
        heads, options = (
            [spec.heads, *3 * [spec.kv_heads]],
            {"generator": draw, "dtype": spec.dtype},
        )
        self.tokens = [
            [torch.randn(n, length, spec.head_dim, **options) for n in heads]
            for _ in range(spec.layers)
        ]
        self.pipeline, self.spec, self.length, self.blocks = pipeline, spec, length, []
        self.prompt, self.done, self.known = prompt, 0, prompt or 0
        self.restart()

    def restart(self):
        """What was generated is read as a prompt is."""
        self.known = max(self.known, self.done)
        self.done = 0
        self.oracles = [Oracle(self.pipeline, self.spec, n) for n in range(self.spec.layers)]

    def part(self, tokens):
        """So many tokens as vLLM would read at once of the next ones."""
        if self.prompt is None:
            return tokens
        return min(tokens, max(self.known - self.done, 1))

    @property
    def straddles(self):
        return self.prompt is not None and self.known > self.prompt


class Engine:
    """Blocks are handed out oldest first, and hold what their last owner left."""

    def __init__(self, pipeline, *, rows, blocks, admitted=None, block=16, spec=SPEC, captured=()):
        self.spec = spec
        self.plan = plan_of(
            pipeline.admission, pipeline.window, spec.layers, spec.kv_heads, 1, block, admitted,
            budget_of(pipeline.eviction),
        )  # fmt: skip
        self.evicts = not pipeline.eviction.neutral
        self.admission, self.window = pipeline.admission, pipeline.window
        self.rows = Rows(spec, pipeline, self.plan, rows, LONGEST)
        tokens = blocks * block * self.plan.heads
        size = tokens * self.rows.token_bytes
        self.rows.bind(torch.zeros(size, dtype=torch.int8, device=spec.device))
        for store in self.rows.pages[:2]:
            store.fill_(1e3)
        # Steps of so many tokens, as graphs would have been captured with them.
        self.captured = {size: self.rows.rehearse(size) for size in captured}
        self.free_rows, self.free = list(range(1, rows + 1)), deque(range(rows + 1, blocks))
        self.running, self.refused, self.steps, self.replays = [], 0, 0, 0
        self.error = 1e-9 if spec.dtype == torch.float64 else 1e-4

    def room_for(self, request, added):
        """Whether a request can go on; then it has the blocks."""
        new = [] if request.blocks else self.free_rows[:1]
        if not request.blocks and not new:
            return False
        wanted = self.plan.blocks(request.done + added, request.prompt)
        missing = wanted - len(request.blocks) - len(new)
        if missing > len(self.free):
            return False
        del self.free_rows[: len(new)]
        request.blocks += new + [self.free.popleft() for _ in range(max(missing, 0))]
        return True

    def end(self, request):
        """Takes its blocks back: it is done, aborted or preempted."""
        self.running.remove(request)
        self.free_rows += request.blocks[:1]
        self.free.extend(reversed(request.blocks[1:]))
        request.blocks = []

    def step(self, batch):
        """One forward of `(request, tokens)` pairs, checked against each request's oracle."""
        self.steps += 1
        if self.steps % 4:  # as vLLM does: those that decode come first
            batch = sorted(batch, key=lambda pair: pair[1] != 1)
        width = max(len(request.blocks) for request, _ in batch)
        device = self.spec.device
        table = torch.zeros(len(batch), width, dtype=torch.int32, device=device)
        for place, (request, _) in enumerate(batch):
            table[place, : len(request.blocks)] = torch.tensor(request.blocks, device=device)
        lengths, added = [request.done for request, _ in batch], [n for _, n in batch]
        size = min((n for n in self.captured if n >= len(batch)), default=0)
        padding = size - len(batch) if set(added) == {1} and size else 0
        if padding:
            table = torch.cat([table, table.new_zeros(padding, width)])
            lengths, added = lengths + [0] * padding, added + [0] * padding
        step = self.rows.begin(table, lengths, added)
        if self.evicts:
            self.end_prompts([request for request, _ in batch])
        if set(added) <= {0, 1} and size:
            step, self.replays = self.captured[size], self.replays + 1
        for layer in range(self.spec.layers):
            new = [
                [x[:, r.done : r.done + n].transpose(0, 1).to(device) for x in r.tokens[layer]]
                for r, n in batch
            ]
            query, key, value, pre = (torch.cat(parts) for parts in zip(*new, strict=True))
            pad = query.new_full((padding, *query.shape[1:]), float("nan"))
            query, key, value, pre = (
                torch.cat([x, pad[:, : x.shape[1]]]) for x in (query, key, value, pre)
            )
            out = torch.full_like(query, float("nan"))
            given, n = (query, key, value, pre), step.decodes
            if n:
                out[:n] = self.rows.decode(step, layer, *(x[:n] for x in given))
            for whole in step.prompts:
                for prompt in parts_of(self.rows, whole):
                    part = slice(prompt.first, prompt.first + prompt.seg.cu_q[1])
                    out[part] = read_prompt(self.rows, prompt, layer, *(x[part] for x in given))
                    if prompt.ends:
                        end_prompt(self.rows, self.rows.layers[layer], prompt.row)
            first = 0
            for request, n in batch:
                wanted = self.expected(request, layer, n).transpose(0, 1)
                found = out[first : first + n].cpu().double()
                torch.testing.assert_close(found, wanted, rtol=self.error, atol=self.error)
                first += n
        for request, n in batch:
            request.done += n
        self.check()

    def end_prompts(self, requests):
        """What the scheduler says before a forward of requests, and the oracles' evictions."""
        ended = [request for request in requests if request.done == request.prompt]
        for request in ended:
            rules.evict(request.oracles)
        row = {request: request.blocks[0] for request in requests}
        prompts = {row[request]: request.prompt for request in requests if not request.done}
        blocks = {row[request]: len(request.blocks) for request in requests}
        hear(self.rows, Ends(prompts, blocks, tuple(row[request] for request in ended)))
        room = {at: n * self.plan.pages_per_block for at, n in blocks.items()}
        assert self.rows.arenas.room[list(room)].tolist() == list(room.values())

    def kept(self, request, layer, head):
        """Positions in the pages of one head."""
        own, row = self.rows.layers[layer], request.blocks[0]
        count = int(own.counts[row, head])
        pages = own.table[row, head, : -(-count // 16)].long()
        assert set((pages // self.plan.pages_per_block).tolist()) <= set(request.blocks)
        self.held += pages.tolist()
        return (self.rows.pages.meta[pages] & POSITION_MASK).flatten()[:count].tolist()

    def expected(self, request, layer, n):
        """What the oracle says, of the tokens that found a page."""
        oracle, old = request.oracles[layer], request.done
        q, k, v, pre = (x[:, old : old + n] for x in request.tokens[layer])
        if self.evicts:
            own = min(max(request.prompt - old, 0), n)
            parts = [[x[:, a:b] for x in (q, k, v, pre)] for a, b in ((0, own), (own, n)) if a < b]
            found, self.held = [oracle.prompt(*parts[0])], []
            for part in parts[1:]:
                rules.evict([oracle])
                found.append(oracle.prompt(*part))
            for head in range(self.spec.kv_heads):
                assert self.kept(request, layer, head) == oracle.pages(head)
            return torch.cat(found, 1)
        oracle.store(q, k, v, pre, prompt=True)
        left, self.held = max(old + n - self.window, 0), []
        for head in range(self.spec.kv_heads):
            kept = self.kept(request, layer, head)
            admitted = oracle.alive[head, :left].nonzero()[:, 0].tolist()
            assert kept == sorted(kept) and set(kept) <= set(admitted)
            self.refused += len(admitted) - len(kept)
            oracle.alive[head, :left] = False
            oracle.alive[head, kept] = True
        i, j = torch.arange(old, old + n)[:, None], torch.arange(old + n)
        far = oracle.alive.repeat_interleave(oracle.group, 0)[:, None]
        return oracle.attend(i[:, 0], (j <= i) & ((i - j < self.window) | far))

    def check(self):
        """No page has two holders, no arena gave more than it has, and counters are right."""
        self.held = []
        for request in self.running:
            if not request.done:
                continue
            row = request.blocks[0]
            for layer in range(self.spec.layers):
                for head in range(self.spec.kv_heads):
                    self.kept(request, layer, head)
            taken = int(self.rows.arenas.taken[row])
            assert taken <= len(request.blocks) * self.plan.pages_per_block
            if self.evicts:
                assert taken == sum(
                    -(-count // 16) for count in self.rows.counts[:, row].flatten().tolist()
                )
            elif isinstance(self.admission, AdmitAll | LocalAttention | DuoAttention):
                assert taken == self.plan.pages(request.done)
        assert len(self.held) == len(set(self.held))
        assert int(self.rows.arenas.refused.sum()) == self.refused
