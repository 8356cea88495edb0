"""Word from the workers to vLLM's scheduler and metrics: of arenas that were full.

vLLM has one public way for it, a KV connector. This one moves no keys: it reports tokens that were
left out as statistics, which vLLM logs and exports, and, where `when_full` is "error", the rows of
such requests as blocks that failed to load, upon which vLLM ends these requests with an error.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from ..._extras import extra
from ...errors import UnsupportedError
from .options import ERROR, options_of, other_model
from .prompt_end import Ends, hear
from .rows import Rows
from .spec import PROMPTS, ArenaSpec

with extra("vllm"):
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        SupportsHMA,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
    )

REFUSED = "vllm:kvpolicy_refused_tokens"


class Refused(KVConnectorStats):
    """Admitted tokens of heads that found no page, since the last report."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data or {"refused": 0})

    def reset(self) -> None:
        self.data = {"refused": 0}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data["refused"] += other.data["refused"]
        return self

    def reduce(self) -> dict[str, int | float]:
        return {"admitted tokens left out": self.data["refused"]}

    def is_empty(self) -> bool:
        return not self.data["refused"]


class RefusedMetrics(KVConnectorPromMetrics):
    """The counter `vllm:kvpolicy_refused_tokens_total` of each engine."""

    def __init__(
        self, config: Any, types: Any, labels: list[str], engines: dict[int, list[object]]
    ) -> None:
        super().__init__(config, types, labels, engines)
        counter = self._counter_cls(
            name=REFUSED,
            documentation="Admitted tokens of KV heads that found no page in their blocks.",
            labelnames=labels,
        )
        self.counters = {engine: counter.labels(*values) for engine, values in engines.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        self.counters[engine_idx].inc(transfer_stats_data["refused"])


@attrs.frozen
class Word(KVConnectorMetadata):
    """From the scheduler to the workers, before each forward."""

    ends: Ends | None = None


class ArenaConnector(KVConnectorBase_V1, SupportsHMA):
    """Known to vLLM as "kvpolicy", in the role "kv_producer"."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = options_of(vllm_config.additional_config)
        if options is None:
            raise ValueError(
                "kvpolicy: kv_connector: wanted 'kvpolicy' in additional_config beside it"
            )
        self.ends = options.when_full == ERROR
        self.config = vllm_config
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        if [type(spec) for spec in specs] != [ArenaSpec]:
            raise UnsupportedError(other_model(vllm_config))
        self.plan = specs[0].plan
        self.prompts: dict[str, int] = {}  # tokens of requests' prompts, and their rows
        self.places: dict[str, int] = {}
        self.rows: Rows | None = None  # of a worker, once it has them
        self.known = self.told = 0
        self.sent: Tensor | None = None
        self.arrived: Any = None

    # On a worker

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        layers = self.config.compilation_config.static_forward_context
        self.rows = layers[next(iter(kv_caches))].impl.rows

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Rows of the step at whose arena's end a token was left out; asked after each step.

        This waits for the step.
        """
        if not self.ends or self.rows is None:
            return set()
        self.known = self.rows.count_refused()
        return self.rows.full()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What is new since the last report. On a GPU the count is that of an earlier step."""
        if self.rows is not None and not self.ends:
            self._look(self.rows)
        if self.known == self.told:
            return None
        new, self.told = self.known - self.told, self.known
        return Refused({"refused": new})

    def _look(self, rows: Rows) -> None:
        if self.sent is not None and (self.arrived is None or self.arrived.query()):
            self.known, self.sent = int(self.sent), None
        if self.sent is None:
            total = rows.arenas.refused.sum()
            if total.is_cuda:
                self.sent = torch.empty((), dtype=total.dtype, pin_memory=True)
                self.sent.copy_(total, non_blocking=True)
                self.arrived = torch.cuda.Event()
                self.arrived.record()
            else:
                self.known = int(total)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded; what the scheduler said is heard."""
        word = self._get_connector_metadata()
        if self.rows is not None and isinstance(word, Word) and word.ends is not None:
            hear(self.rows, word.ends)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    # Beside the scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        # A session's later inputs make its prompt longer: its first one has ended before.
        self.prompts.setdefault(request.request_id, request.num_prompt_tokens)
        return 0, False

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self.prompts = PROMPTS.setdefault(gpu_block_pool, {})

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.places[request.request_id] = blocks.get_block_ids()[0][0]

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if self.plan.budget is None:
            return Word()
        new, old = scheduler_output.scheduled_new_reqs, scheduler_output.scheduled_cached_reqs
        before = {request.req_id: request.num_computed_tokens for request in new}
        before |= dict(zip(old.req_ids, old.num_computed_tokens, strict=True))
        prompts, blocks, ended = {}, {}, []
        for name, added in scheduler_output.num_scheduled_tokens.items():
            row, prompt, done = self.places[name], self.prompts[name], before[name]
            blocks[row] = self.plan.blocks(done + added, prompt)
            if done == 0:
                prompts[row] = prompt
            if done == prompt:
                ended.append(row)
        return Word(Ends(prompts, blocks, tuple(ended)))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        for known in (self.prompts, self.places):
            known.pop(request.request_id, None)
        return False, None

    # Of vLLM's log and metrics

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return Refused(data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:  # fmt: skip
        return RefusedMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
