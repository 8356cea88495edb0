"""RULER's tasks (arXiv 2404.06654), generated at any length from any text, in wordings of our own.

Eleven are synthetic; two ask the questions of files that a user has (`questions.py`). Counts and
kinds are those of the paper's configuration (NVIDIA/RULER, scripts/synthetic.yaml).
"""

from .generate import RETRIEVAL as RETRIEVAL
from .generate import SYNTHETIC as SYNTHETIC
from .generate import Ruler as Ruler
