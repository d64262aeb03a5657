"""Run every test that needs a GPU, and write the outcomes as they come.

python -m bench.gpu_tests [--json FILE] [--marker gpu] [FOLDER]

Needs torch, triton and pytest. A test file that cannot be imported because somebody's package is
missing is skipped; one that misses a module of ours fails.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench.markdown import document, table
from bench.provenance import ROOT, header, save

OUR_PACKAGES = ("laser_fast", "laser_kernels", "bench")
# The project's own options but for strict markers, which may be those of a missing plugin.
FLAGS = ["-o", "addopts=--import-mode=importlib", "--rootdir", str(ROOT)]
FLAGS += ["-p", "no:cacheprovider", "-p", "no:terminal", "--continue-on-collection-errors"]


class Outcomes:
    """A pytest plugin that hears what became of each test, and writes it down."""

    def __init__(self, path: Path | None) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.path, self.header = path, {"op": "gpu_tests"} | header(device)
        self.rows: list[dict[str, str]] = []
        self.missing: dict[str, str] = {}  # node -> package that its import did not find

    def add(self, name: str, outcome: str, reason: str) -> None:
        """Take one test's outcome: passed, failed or skipped."""
        self.rows.append({"test": name, "outcome": outcome, "reason": reason})
        print(f"{outcome}  {name}  {reason}", flush=True)
        if self.path:
            save(self.path, self.header, self.rows, self.document())

    def document(self) -> str:
        """Counts, then every test that did not pass."""
        others = [row for row in self.rows if row["outcome"] != "passed"]
        cells = [[row["test"], row["outcome"], row["reason"]] for row in others]
        lines = [self.summary, "", *table(["test", "outcome", "reason"], cells)]
        return document(self.header, []) + "\n" + "\n".join(lines) + "\n"

    @property
    def summary(self) -> str:
        """For example "31 passed, 1 failed"."""
        counts = Counter(row["outcome"] for row in self.rows)
        return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Hear a phase of a test from pytest."""
        if report.when == "call" or report.outcome != "passed":
            self.add(report.nodeid, report.outcome, _reason(report.longrepr))

    def pytest_exception_interact(
        self, call: pytest.CallInfo, report: pytest.CollectReport | pytest.TestReport
    ) -> None:
        """Hear of an exception before its report; pytest wraps what an import raises."""
        error = call.excinfo.value
        error = error.__cause__ or error
        if isinstance(error, ModuleNotFoundError) and error.name:
            self.missing[report.nodeid] = error.name.partition(".")[0]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Hear that a file cannot be collected, or that it skips itself."""
        if report.passed:
            return
        missing = self.missing.get(report.nodeid)
        is_skipped = report.skipped or (missing and missing not in OUR_PACKAGES)
        self.add(report.nodeid, "skipped" if is_skipped else "failed", _reason(report.longrepr))


def _reason(longrepr: object) -> str:
    """One line of what pytest has to say: the exception of a failure, the reason of a skip."""
    if isinstance(longrepr, tuple):
        return longrepr[2]
    crash = getattr(longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(longrepr or "")).strip().splitlines()
    return lines[0 if crash else -1][:500] if lines else ""


def files_with(marker: str, folder: Path) -> list[Path]:
    """Test files that name the marker: others may import what is not installed here."""
    found = sorted(folder.rglob("test_*.py"))
    return [path for path in found if f"mark.{marker}" in path.read_text()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests; 0 if none failed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path, nargs="?", default=ROOT / "tests")
    options.add_argument("--json", type=Path, metavar="FILE")
    options.add_argument("--marker", default="gpu")
    args = options.parse_args(argv)
    outcomes = Outcomes(args.json)
    files = map(str, files_with(args.marker, args.folder.resolve()))
    code = pytest.main([*FLAGS, "-m", args.marker, *files], plugins=[outcomes])
    print(outcomes.summary or "no test found")
    is_broken = code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)
    return int(is_broken or any(row["outcome"] == "failed" for row in outcomes.rows))


if __name__ == "__main__":
    raise SystemExit(main())
