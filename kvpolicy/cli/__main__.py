"""`python -m kvpolicy.cli`."""

from . import main

main()
