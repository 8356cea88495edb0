"""The benchmark of kvpolicy: `kvpolicy bench`, or `python -m kvpolicy.bench`."""

from .runner import GROUPS as GROUPS
from .runner import run as run
