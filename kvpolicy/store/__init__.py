"""Where tokens are kept: ring, pages, tables, and what they cost."""

from .report import Report as Report
from .state import CacheState as CacheState
