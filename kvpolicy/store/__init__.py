"""Where tokens are kept: ring, pages, tables, and what they cost."""

from .page_counts import free_pages as free_pages
from .page_counts import held_pages as held_pages
from .page_counts import prompt_pages as prompt_pages
from .page_counts import step_pages as step_pages
from .parking import Parked as Parked
from .parking import park as park
from .parking import unpark as unpark
from .persist import load as load
from .persist import save as save
from .report import Report as Report
from .slots import clear as clear
from .slots import move as move
from .slots import side_state as side_state
from .state import CacheState as CacheState
