"""Hugging Face transformers through public extension points."""

# First, so that another transformers is refused before anything of it is imported.
# isort: split
from . import versions as _versions  # noqa: F401

# isort: split
from .attach import Attachment as Attachment
from .attach import attach as attach
from .attach import detach as detach
from .attach import generate_many as generate_many
from .cache import KVPolicyCache as KVPolicyCache
from .cache import new_cache as new_cache
from .many import Finished as Finished
from .many import Held as Held
from .many import Request as Request
from .many import Timings as Timings
from .memory import FitReport as FitReport
from .memory import fit_report as fit_report
from .persist import load_cache as load_cache
from .replay import repeats as repeats
from .sizes import spec_of as spec_of
from .warm import Warmed as Warmed
