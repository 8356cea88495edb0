"""What is asked of a cache: tasks on texts, and the loss on a text."""

from .recall import TASKS as TASKS
from .recall import copying as copying
from .recall import facts as facts
from .recall import key_values as key_values
from .recall import needles as needles
