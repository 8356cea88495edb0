"""The torch reference: every op in vectorised torch, for CPUs and as the kernels' measure."""

from .cache_write import append as append
from .cache_write import decode_write as decode_write
from .compact import move_kept as move_kept
from .compact import read_tokens as read_tokens
from .dense_prefill import dense_prefill as dense_prefill
from .expected_attention import expected_logits as expected_logits
from .expected_attention import value_norms as value_norms
from .keep_best import keep_best as keep_best
from .page_io import copy_pages as copy_pages
from .page_io import read_meta as read_meta
from .page_io import read_pages as read_pages
from .page_io import read_summary as read_summary
from .page_io import write_summary as write_summary
from .page_select import quest_select as quest_select
from .page_select import top_pages as top_pages
from .paged_decode import paged_decode as paged_decode
from .prompt_write import count_leaving as count_leaving
from .prompt_write import write_leaving as write_leaving
from .redundancy import last_similar as last_similar
from .ring import advance_ring as advance_ring
from .sparse_prefill import prefill_attention as prefill_attention
from .window_scores import window_scores as window_scores
from .write_gate import write_gate as write_gate
