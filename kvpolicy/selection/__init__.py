"""Selection policies: what to read."""

from ._base import PromptSelection as PromptSelection
from ._base import SelectAll as SelectAll
from ._base import Selection as Selection
from ._base import combine_group as combine_group
from ._prompt import PromptCall as PromptCall
from ._prompt import PromptView as PromptView
from ._prompt import Reads as Reads
from .flex_prefill import FlexPrefill as FlexPrefill
from .per_phase import PerPhase as PerPhase
from .quest import Quest as Quest
from .top_channels import TopChannels as TopChannels
from .vertical_slash import VerticalSlash as VerticalSlash
from .xattention import XAttention as XAttention
