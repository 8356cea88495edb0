"""Runs the benchmark from the command line."""

from __future__ import annotations

import argparse
import sys

from . import GROUPS, run


def main() -> int:
    """Parses the command line; returns 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m kvpolicy.bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"groups ({', '.join(GROUPS)}) or parts of names")
    parser.add_argument("--out", default="bench/out", help="folder for results (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, also without a GPU")
    parser.add_argument("--seconds", type=float, default=540.0, help="time limit (%(default)s)")
    options = parser.parse_args()
    rows = run(options.names, out=options.out, quick=options.quick, seconds=options.seconds)
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
