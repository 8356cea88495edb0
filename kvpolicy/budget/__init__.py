"""Budgets: how many tokens a KV head may hold, the local window included."""

from ._base import Budget as Budget
from ._base import BudgetView as BudgetView
from ._base import Counts as Counts
from ._base import KeepBest as KeepBest
from ._base import is_budget as is_budget
from ._policies import bound_layers as bound_layers
from ._policies import budget_of as budget_of
from ._policies import check_budget as check_budget
from ._wrapper import budget_knob as budget_knob
from .across_layers import AcrossLayers as AcrossLayers
from .adaptive import Adaptive as Adaptive
from .headkv import HeadKV as HeadKV
from .lazy_layers import LazyLayers as LazyLayers
from .lukv import LUKV as LUKV
from .pyramid import Pyramid as Pyramid
from .tokens import Ratio as Ratio
from .tokens import Tokens as Tokens
from .tokens import tokens_from_int as tokens_from_int
from .total_cap import TotalCap as TotalCap
