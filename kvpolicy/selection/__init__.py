"""Selection policies: what to read."""

from ._base import SelectAll as SelectAll
from ._base import Selection as Selection
from ._base import combine_group as combine_group
from .quest import Quest as Quest
from .top_channels import TopChannels as TopChannels
