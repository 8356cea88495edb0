"""Texts to evaluate on and to train on."""

from .sources import bible as bible
from .sources import jargon as jargon
from .sources import novels as novels
from .sources import perl_manual as perl_manual
from .sources import python_manual as python_manual
from .sources import python_topics as python_topics
from .sources import training_texts as training_texts
