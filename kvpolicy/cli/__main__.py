"""`python -m kvpolicy.cli`."""

from . import app

app()
