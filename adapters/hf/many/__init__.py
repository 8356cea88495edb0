"""Many requests over one model: slots that decode together, and prompts beside them."""

from .requests import Finished as Finished
from .requests import Held as Held
from .requests import Request as Request
from .requests import Timings as Timings
