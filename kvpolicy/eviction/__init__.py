"""Eviction policies: what to drop."""

from ._base import Eviction as Eviction
from ._base import EvictionView as EvictionView
from ._base import KeepAll as KeepAll
from ._base import QueryStats as QueryStats
from ._base import StoredTokens as StoredTokens
from .at_prompt_end import AtPromptEnd as AtPromptEnd
from .critical_kv import CriticalKV as CriticalKV
from .dbudgetkv import DBudgetKV as DBudgetKV
from .expected_attention import ExpectedAttention as ExpectedAttention
from .fastgen import FastGen as FastGen
from .h2o import H2O as H2O
from .keydiff import KeyDiff as KeyDiff
from .knorm import Knorm as Knorm
from .kv_press import KVPress as KVPress
from .lagkv import LagKV as LagKV
from .q_filters import QFilters as QFilters
from .r_kv import RKV as RKV
from .sage_kv import SageKV as SageKV
from .simlayerkv import SimLayerKV as SimLayerKV
from .snapkv import SnapKV as SnapKV
from .streaming_llm import StreamingLLM as StreamingLLM
from .tova import TOVA as TOVA
from .triattention import TriAttention as TriAttention
