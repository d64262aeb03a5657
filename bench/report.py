"""Committed results as the README's table and a plot.

    python -m bench.report [FILE ...] [--op linear_logprob_loss] [--shape qwen2.5-7b] [--plot PNG]

Files default to everything in bench/results/. The table is of one size, the plot of all N: time
and memory of each provider, and the floor. Time's floor is the bound timed in the same process,
memory's the two gradients.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench.markdown import table
from bench.provenance import ROOT

MODE = "fwd+bwd"
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def read(paths: Sequence[Path], op: str, shape: str) -> list[dict]:
    """Rows of one op and shape, each with its file's name and its device; later files win."""
    rows: dict[tuple, dict] = {}
    for path in paths:
        result = json.loads(path.read_text())
        for row in result["rows"]:
            case = row.get("case", {})
            if case.get("op") == op and case.get("shape") == shape:
                source = {"file": _shown(path), "device": result["header"]["device"]}
                rows[case["N"], row["provider"]] = row | source
    return list(rows.values())


def _shown(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def markdown(rows: Sequence[dict], num_rows: int) -> str:
    """One table at N = `num_rows`: the ranked first, then bounds; below, what was not measured."""
    rows = [row for row in rows if row["case"]["N"] == num_rows]
    measured = [row for row in rows if MODE in row["times"]]
    if not measured:
        return "not yet measured\n"
    measured.sort(key=lambda row: (row["status"] == "bound", row["rank"] or 99))
    cells = [[row["provider"], *_numbers(row), _remark(row)] for row in measured]
    columns = ["provider", f"{MODE} ms", "x unfused", "x bound", "peak extra GiB", "max error", ""]
    case = ", ".join(f"{key} {value}" for key, value in rows[0]["case"].items() if key != "op")
    sources = ", ".join(sorted({f"`{row['file']}`" for row in rows}))
    caption = f"{rows[0]['case']['op']}, {case}, on {rows[0]['device']} ({sources})"
    lines = [caption, "", *table(columns, cells)]
    absent = [f"{row['provider']} ({row['reason']})" for row in rows if row not in measured]
    if absent:
        lines += ["", "Not measured: " + "; ".join(absent)]
    return "\n".join(lines) + "\n"


def _numbers(row: dict) -> list[str]:
    time, peak = row["times"][MODE], row["peak_extra_mib"].get(MODE)
    errors = [f"{name} {error['value']:.1e}" for name, error in row["errors"].items()]
    ratios = [f"{time[key]:.2f}" if key in time else "-" for key in ("x_baseline", "x_bound")]
    memory = "-" if peak is None else f"{peak / 1024:.2f}"
    return [f"{time['median_ms']:.4g}", *ratios, memory, ", ".join(errors) or "-"]


def _remark(row: dict) -> str:
    if row["status"] in ("ok", "bound"):
        return f"cannot: {row['cannot']}" if row["cannot"] else ""
    return f"{row['status']}: {row['reason']}"


def plot(rows: Sequence[dict], path: Path) -> None:
    """Time and memory against N, log-log, one line per provider, floors dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, value_of, label in zip(
        axes, (_milliseconds, _gibibytes), (f"{MODE}, ms", "peak extra memory, GiB"), strict=True
    ):
        for provider in dict.fromkeys(row["provider"] for row in rows if row["status"] == "ok"):
            points = [row for row in rows if row["provider"] == provider]
            _line(axis, points, value_of, label=provider, marker="o", markersize=3)
        axis.set(xscale="log", yscale="log", xlabel="rows N", ylabel=label)
        axis.grid(alpha=0.3)
    bounds = [row for row in rows if row["status"] == "bound"]
    slowest = {
        number: max((row for row in bounds if row["case"]["N"] == number), key=_milliseconds)
        for number in {row["case"]["N"] for row in bounds}
    }
    dashed = {"color": "black", "linestyle": "--", "linewidth": 1}
    _line(axes[0], list(slowest.values()), _milliseconds, label="floor", **dashed)
    floors = {row["case"]["N"]: row for row in rows}
    _line(axes[1], list(floors.values()), _gradients, label="floor", **dashed)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    case = rows[0]["case"]
    figure.suptitle(f"{case['op']}, {case['shape']}, {case['dtype']}, {rows[0]['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _line(axis, rows: list[dict], value_of, **style) -> None:
    points = sorted((row["case"]["N"], value_of(row)) for row in rows if MODE in row["times"])
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def _milliseconds(row: dict) -> float:
    return row["times"][MODE]["median_ms"] if MODE in row["times"] else 0.0


def _gibibytes(row: dict) -> float:
    peak = row["peak_extra_mib"].get(MODE)
    return float("nan") if peak is None else peak / 1024


def _gradients(row: dict) -> float:
    case = row["case"]
    return (case["N"] + case["V"]) * case["D"] * BYTES[case["dtype"]] / 2**30


def main(argv: Sequence[str] | None = None) -> str:
    """Print the table and draw the plot; returns the table."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("files", nargs="*", type=Path)
    options.add_argument("--op", default="linear_logprob_loss")
    options.add_argument("--shape", default="qwen2.5-7b")
    options.add_argument("--rows", type=int, default=8192, help="N of the table")
    options.add_argument("--plot", type=Path, metavar="PNG")
    args = options.parse_args(argv)
    files = args.files or sorted((ROOT / "bench" / "results").glob("*.json"))
    rows = read(files, args.op, args.shape)
    text = markdown(rows, args.rows)
    print(text)
    if args.plot and rows:
        plot(rows, args.plot)
    return text


if __name__ == "__main__":
    main()
