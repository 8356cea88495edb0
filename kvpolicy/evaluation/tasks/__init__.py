"""What is asked of a cache: tasks on texts, and the loss on a text."""

from .loss import LOSS as LOSS
from .recall import RECALL
from .recall import copying as copying
from .recall import facts as facts
from .recall import key_values as key_values
from .recall import needles as needles
from .task import Task as Task

#: By name.
TASKS = {task.name: task for task in (*RECALL, LOSS)}
