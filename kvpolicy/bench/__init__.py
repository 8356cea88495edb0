"""The benchmark of kvpolicy: `kvpolicy bench`."""

from .runner import GROUPS as GROUPS
from .runner import run as run
