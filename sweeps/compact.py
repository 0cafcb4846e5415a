"""Merge the many small files of the results into one a table: `python sweeps/compact.py`.

Safe to interrupt and beside a running sweep; no row changes. Prints how many files each table had. Exit status: 0
done, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from memlib.errors import InputError
from memlib.results import open_results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python sweeps/compact.py", description="Merge the results' files.")
    parser.add_argument("--results", default="results", help="folder or URI of the results (default: results)")
    given = parser.parse_args(arguments)
    try:
        found = open_results(given.results).compact()
    except (InputError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("".join(f"{table}: {n} files are 1 now\n" for table, n in found.items() if n > 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
