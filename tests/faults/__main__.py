"""The drill: `python -m tests.faults [--only PART ...] [--report FILE]`.

Runs every row of the table whose name holds one of the parts, prints what came of it, and writes
the Markdown table. Exit code 1 says that a row did not end as it has to.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from .drill import Drill
from .report import table
from .rows import ROWS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of rows")
    parser.add_argument("--list", action="store_true", help="only show the names of the rows")
    parser.add_argument("--report", nargs="?", const="", help="print the table, or write it")
    parser.add_argument("--folder", type=Path, help="where runs are kept; else they are not")
    given = parser.parse_args()
    chosen = {row.name: row for part in given.only for row in ROWS if part in row.name}
    rows = list(chosen.values())  # in the order of the parts
    if given.list:
        print(*(row.name for row in rows), sep="\n")
        return 0
    say = partial(print, flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        outcomes = Drill(given.folder or Path(temporary), say).run(rows)
    if given.report is not None:
        text = table(sorted(outcomes, key=lambda found: ROWS.index(found.row)))
        if given.report:
            Path(given.report).write_text(text)
        print(text)
    return int(any(found.faults for found in outcomes))


if __name__ == "__main__":
    sys.exit(main())
