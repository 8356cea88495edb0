"""Lets the tests of this folder, which must not be a package, share pool.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
