"""Selection policies: what to read."""

from ._base import SelectAll as SelectAll
from ._base import Selection as Selection
from .quest import Quest as Quest
