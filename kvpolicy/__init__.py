"""kvpolicy: admission, selection and eviction of the KV cache, composed.

    pipeline = CachePipeline(admission=..., selection=..., eviction=...)
    with attach(model, pipeline):
        model.generate(...)

See `kvpolicy.adapters.hf` for all that serves models of Hugging Face transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._knob import Knob as Knob
from .admission import AdaEA as AdaEA
from .admission import Admission as Admission
from .admission import AdmitAll as AdmitAll
from .admission import DuoAttention as DuoAttention
from .admission import KVzap as KVzap
from .admission import LocalAttention as LocalAttention
from .admission import RandomGate as RandomGate
from .admission import Write as Write
from .admission import WriteGate as WriteGate
from .admission import all_of as all_of
from .admission import any_of as any_of
from .budget import LUKV as LUKV
from .budget import AcrossLayers as AcrossLayers
from .budget import Adaptive as Adaptive
from .budget import Budget as Budget
from .budget import BudgetView as BudgetView
from .budget import HeadKV as HeadKV
from .budget import LazyLayers as LazyLayers
from .budget import Pyramid as Pyramid
from .budget import Ratio as Ratio
from .budget import Tokens as Tokens
from .budget import TotalCap as TotalCap
from .errors import BackendError as BackendError
from .errors import CapacityError as CapacityError
from .errors import KVPolicyError as KVPolicyError
from .errors import PhaseError as PhaseError
from .errors import RollbackError as RollbackError
from .errors import UnsupportedError as UnsupportedError
from .eviction import GKV as GKV
from .eviction import H2O as H2O
from .eviction import RKV as RKV
from .eviction import TOVA as TOVA
from .eviction import AtPromptEnd as AtPromptEnd
from .eviction import CapKV as CapKV
from .eviction import CriticalKV as CriticalKV
from .eviction import DBudgetKV as DBudgetKV
from .eviction import Eviction as Eviction
from .eviction import EvictionView as EvictionView
from .eviction import ExpectedAttention as ExpectedAttention
from .eviction import FastGen as FastGen
from .eviction import FastKVzip as FastKVzip
from .eviction import JudgeQ as JudgeQ
from .eviction import KeepAll as KeepAll
from .eviction import KeyDiff as KeyDiff
from .eviction import Knorm as Knorm
from .eviction import KVPress as KVPress
from .eviction import KVzip as KVzip
from .eviction import LagKV as LagKV
from .eviction import QFilters as QFilters
from .eviction import QueryStats as QueryStats
from .eviction import Ranked as Ranked
from .eviction import SageKV as SageKV
from .eviction import SimLayerKV as SimLayerKV
from .eviction import SnapKV as SnapKV
from .eviction import StreamingLLM as StreamingLLM
from .eviction import TriAttention as TriAttention
from .eviction import TrimKV as TrimKV
from .per_layer import per_layer as per_layer
from .pipeline import CachePipeline as CachePipeline
from .pipeline_files import load_pipeline as load_pipeline
from .pipeline_files import save_pipeline as save_pipeline
from .rope import Rope as Rope
from .selection import FlexPrefill as FlexPrefill
from .selection import PerPhase as PerPhase
from .selection import PromptSelection as PromptSelection
from .selection import PromptView as PromptView
from .selection import Quest as Quest
from .selection import Reads as Reads
from .selection import SelectAll as SelectAll
from .selection import Selection as Selection
from .selection import TopChannels as TopChannels
from .selection import VerticalSlash as VerticalSlash
from .selection import XAttention as XAttention
from .spec import CacheSpec as CacheSpec
from .store import CacheState as CacheState
from .store import Report as Report

if TYPE_CHECKING:
    from .adapters.hf.attach import attach as attach
    from .adapters.hf.cache import new_cache as new_cache
else:
    _LATER = {"attach": ".adapters.hf", "new_cache": ".adapters.hf"}

    def __getattr__(name: str) -> Any:
        """Imports what needs transformers when it is first asked for.

        ImportError for a name of another library: an AttributeError's text is lost in
        `from kvpolicy import AdaKV`.
        """
        if name not in _LATER:
            elsewhere = import_module("._elsewhere", __name__)
            if says := elsewhere.known_elsewhere(name, __all__):
                raise ImportError(says)
            hint = elsewhere.near(name, __all__)
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
        value = globals()[name] = getattr(import_module(_LATER[name], __name__), name)
        return value


__version__ = "0.2.0"

__all__ = [
    "AcrossLayers",
    "AdaEA",
    "Adaptive",
    "Admission",
    "AdmitAll",
    "AtPromptEnd",
    "BackendError",
    "Budget",
    "BudgetView",
    "CachePipeline",
    "CacheSpec",
    "CacheState",
    "CapKV",
    "CapacityError",
    "CriticalKV",
    "DBudgetKV",
    "DuoAttention",
    "Eviction",
    "EvictionView",
    "ExpectedAttention",
    "FastGen",
    "FastKVzip",
    "FlexPrefill",
    "GKV",
    "H2O",
    "HeadKV",
    "JudgeQ",
    "KVPolicyError",
    "KVPress",
    "KVzap",
    "KVzip",
    "KeepAll",
    "KeyDiff",
    "Knob",
    "Knorm",
    "LUKV",
    "LagKV",
    "LazyLayers",
    "LocalAttention",
    "PerPhase",
    "PhaseError",
    "PromptSelection",
    "PromptView",
    "Pyramid",
    "QFilters",
    "QueryStats",
    "Quest",
    "RKV",
    "RandomGate",
    "Ranked",
    "Ratio",
    "Reads",
    "Report",
    "RollbackError",
    "Rope",
    "SageKV",
    "SelectAll",
    "Selection",
    "SimLayerKV",
    "SnapKV",
    "StreamingLLM",
    "TOVA",
    "Tokens",
    "TopChannels",
    "TotalCap",
    "TriAttention",
    "TrimKV",
    "UnsupportedError",
    "VerticalSlash",
    "Write",
    "WriteGate",
    "XAttention",
    "all_of",
    "any_of",
    "attach",
    "load_pipeline",
    "new_cache",
    "per_layer",
    "save_pipeline",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
