"""Command line, cases and result files that the benchmarks share."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.harness import Budget, Case, Entry, Row, Unavailable, measure, reason_of
from bench.markdown import document, page
from bench.provenance import header, save
from bench.providers import COMPILED
from bench.shapes import ROWS, SHAPES, Inputs, Shape, make_input_sets

SMOKE_ROWS = (8, 200)
SMOKE_BUDGET = Budget(seconds=0.0, min_rounds=2, memory_repeats=1)
# A compiler takes longer than the rest of the smoke run.
SMOKE_SKIP = {COMPILED: "not part of --smoke"}

Entries = Callable[[list[Inputs]], list[Entry]]


def base_parser(description: str, *, smoke: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes; `smoke` says what --smoke does."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--smoke", action="store_true", help=smoke)
    options.add_argument(
        "--json", type=Path, metavar="FILE", help="write FILE, and its table as .md"
    )
    return options


def parser(description: str) -> argparse.ArgumentParser:
    """The options of a benchmark that compares providers."""
    options = base_parser(description, smoke="one tiny CPU case of every provider")
    options.add_argument("--shapes", default="qwen2.5-7b", help=f"of {', '.join(SHAPES)}, or all")
    options.add_argument("--rows", default=",".join(map(str, ROWS)), help="N, comma-separated")
    options.add_argument("--dtype", default=None, help="default: bfloat16 on a GPU, else float32")
    options.add_argument(
        "--seconds", type=float, help=f"per case and mode, default {Budget().seconds}"
    )
    options.add_argument("--only", default="", help="providers to measure, comma-separated")
    options.add_argument(
        "--skip", action="append", default=[], metavar="NAME=REASON", help="provider to leave out"
    )
    options.add_argument("--resume", action="store_true", help="keep the cases in FILE")
    return options


class Results:
    """Rows measured so far: on disk after every provider, on standard output after every case."""

    def __init__(self, op: str, args: argparse.Namespace, device: torch.device) -> None:
        self.op, self.path = op, args.json
        self.header = {"op": op} | header(device)
        self.rows: list[dict] = []
        if args.resume and self.path and self.path.exists():
            rows = json.loads(self.path.read_text())["rows"]
            self.rows = [row for row in rows if not row.get("is_preliminary")]
        print(document(self.header, []))

    def has(self, label: dict[str, object]) -> bool:
        """Whether an earlier attempt finished this case."""
        return any(row["case"] == label for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Take the final rows of one case."""
        new = [row.as_dict() for row in rows]
        self.rows.extend(new)
        print(document({}, new), flush=True)
        self._save(self.rows)

    def show(self, rows: Sequence[Row]) -> None:
        """Take what is known of a case so far, for the case that nothing more will be."""
        self._save([*self.rows, *(row.as_dict() | {"is_preliminary": True} for row in rows)])

    def _save(self, rows: list[dict]) -> None:
        if self.path:
            save(self.path, self.header, rows, document(self.header, rows))


def publish(
    args: argparse.Namespace,
    facts: dict[str, str],
    columns: Sequence[str],
    cells: Sequence[Sequence],
    rows: list[dict],
) -> list[dict]:
    """Print one table and, with --json, write it; returns the rows."""
    text = page(facts, columns, cells)
    print(text)
    if args.json:
        save(args.json, facts, rows, text)
    return rows


def budget(args: argparse.Namespace) -> Budget:
    """How long to time a case."""
    if args.seconds is not None:
        return Budget(args.seconds)
    return SMOKE_BUDGET if args.smoke else Budget()


def device_of(args: argparse.Namespace) -> torch.device:
    """A GPU if there is one, except for --smoke and --cpu."""
    is_cpu = args.smoke or getattr(args, "cpu", False) or not torch.cuda.is_available()
    return torch.device("cpu" if is_cpu else "cuda")


def select(entries: Sequence[Entry], args: argparse.Namespace) -> list[Entry]:
    """Apply --only and --skip; a skipped provider keeps its row, with the reason."""
    only = {name.strip() for name in args.only.split(",") if name.strip()}
    unknown = only - {entry.name for entry in entries}
    if unknown:
        raise SystemExit(
            f"--only: no provider {', '.join(sorted(unknown))}; there are "
            f"{', '.join(entry.name for entry in entries)}"
        )
    reasons = dict(part.partition("=")[::2] for part in args.skip)
    reasons = (SMOKE_SKIP if args.smoke else {}) | reasons
    return [
        _unavailable(entry, reasons[entry.name] or "left out") if entry.name in reasons else entry
        for entry in entries
        if not only or entry.name in only
    ]


def _unavailable(entry: Entry, reason: str) -> Entry:
    def refuse() -> None:
        raise Unavailable(reason)

    return replace(entry, prepare=refuse)


def announce(name: str) -> None:
    """Leave the name of the provider whose code runs now, for bench/guard.py."""
    if mark := os.environ.get("BENCH_MARK"):
        Path(mark).write_text(name)


def run_head(
    op: str, args: argparse.Namespace, entries_of: Entries, *, modes: Sequence[str], baseline: str
) -> list[dict]:
    """Measure one op of the head at every size that is asked for; returns all rows."""
    device = device_of(args)
    name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    results = Results(op, args, device)
    for shape, num_rows in _sizes(args):
        label = {
            "op": op,
            "shape": shape.name,
            "N": num_rows,
            "D": shape.hidden_size,
            "V": shape.vocabulary,
            "dtype": name,
        }
        if results.has(label):
            continue
        try:
            sets = make_input_sets(shape, num_rows, getattr(torch, name), device)
        except torch.OutOfMemoryError as error:
            reason = f"inputs: {reason_of(error)}"
            results.add([Row(label, "all", status="skipped", reason=reason)])
            continue
        case = Case(label, modes, select(entries_of(sets), args), baseline, device)
        results.add(measure(case, budget(args), on_start=announce, on_rows=results.show))
    return results.rows


def _sizes(args: argparse.Namespace) -> Iterator[tuple[Shape, int]]:
    names = args.shapes.split(",")
    if args.smoke:
        names = ["smoke"]
    elif args.shapes == "all":
        names = [name for name in SHAPES if name not in ("cpu", "smoke")]
    if unknown := set(names) - set(SHAPES):
        raise SystemExit(f"--shapes: no shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    for name in names:
        for num_rows in SMOKE_ROWS if args.smoke else map(int, args.rows.split(",")):
            yield SHAPES[name], num_rows
