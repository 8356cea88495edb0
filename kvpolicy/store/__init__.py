"""Where tokens are kept: ring, pages, tables, and what they cost."""

from .persist import load as load
from .persist import save as save
from .report import Report as Report
from .state import CacheState as CacheState
