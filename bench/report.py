"""Show committed results as the README's table and as a plot.

    python -m bench.report [FILE ...] [--op linear_logprob_loss] [--shape qwen2.5-7b] [--plot PNG]

Files default to everything in bench/results/. The table shows one size, the plot all N: time and
memory of each provider, and the floor. The floor of time is the bound that was timed in the same
process; the floor of memory is the two gradients.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench.markdown import errors, table
from bench.provenance import ROOT
from bench.providers import BASELINE

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
    columns = [
        "provider",
        f"{MODE} ms",
        "x unfused",
        "x bound",
        "peak extra GiB",
        "max error (library GEMM)",
        "",
    ]
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
    ratios = [f"{time[key]:.2f}" if key in time else "-" for key in ("x_baseline", "x_bound")]
    memory = "-" if peak is None else f"{peak / 1024:.3g}"
    return [f"{time['median_ms']:.4g}", *ratios, memory, errors(row)]


def _remark(row: dict) -> str:
    if row["status"] in ("ok", "bound"):
        return f"cannot: {row['cannot']}" if row["cannot"] else ""
    return f"{row['status']}: {row['reason']}"


def plot(rows: Sequence[dict], path: Path) -> None:
    """Time in multiples of its floor, and memory, against N: one line per provider.

    Below each N stands the floor in milliseconds. Dashed: providers that do a smaller job.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    floor = {row["case"]["N"]: 0.0 for row in rows}
    for row in rows:
        if row["status"] == "bound":
            floor[row["case"]["N"]] = max(floor[row["case"]["N"]], _milliseconds(row))
    numbers = sorted(number for number in floor if floor[number])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    good = [row for row in rows if row["status"] == "ok" and MODE in row["times"]]
    for index, provider in enumerate(dict.fromkeys(row["provider"] for row in good)):
        points = {row["case"]["N"]: row for row in good if row["provider"] == provider}
        style = _style(index, provider, is_smaller_job=not any(r["rank"] for r in points.values()))
        times = [(n, _milliseconds(points[n]) / floor[n]) for n in numbers if n in points]
        peaks = [(n, _gibibytes(points[n])) for n in sorted(points)]
        for axis, values in ((left, times), (right, peaks)):
            axis.plot([n for n, _ in values], [value for _, value in values], **style)
    dotted = {"color": "black", "linestyle": ":", "label": "floor"}
    left.plot(numbers, [1.0] * len(numbers), **dotted)
    gradients = {row["case"]["N"]: _gradients(row) for row in rows}
    right.plot(sorted(gradients), [gradients[n] for n in sorted(gradients)], **dotted)
    left.set(title=f"time of {MODE}, multiples of the floor", xlabel="rows N (floor, ms)")
    right.set(title="peak extra memory, GiB (floor: the gradients)", xlabel="rows N")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log")
        axis.xaxis.set_minor_locator(plt.NullLocator())
        for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(axis="y", which="both", labelsize=8)
        axis.grid(alpha=0.3, which="both")
    left.yaxis.set_major_locator(plt.LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    left.set_xticks(numbers, [f"{n}\n({floor[n]:.3g})" for n in numbers])
    right.set_xticks(sorted(gradients), [str(n) for n in sorted(gradients)])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    case = rows[0]["case"]
    figure.suptitle(f"{case['op']}, {case['shape']}, {case['dtype']}, {rows[0]['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _style(index: int, provider: str, *, is_smaller_job: bool) -> dict:
    is_ours = provider.startswith("ours")
    return {
        "label": provider,
        "color": "black" if provider == BASELINE else f"C{index % 10}",
        "linestyle": "--" if is_smaller_job else "-",
        "linewidth": 2.5 if is_ours else 1.2,
        "marker": "o^svDPX<>*ph"[index % 12],
        "markersize": 7 if is_ours else 5,
        "zorder": 3 if is_ours else 2,
    }


def _milliseconds(row: dict) -> float:
    return row["times"][MODE]["median_ms"]


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
