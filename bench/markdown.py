"""Results as Markdown tables: one per case, one row per provider."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby


def document(header: Mapping[str, str], rows: Sequence[dict]) -> str:
    """Header as a list, then a table for every case."""
    lines = [f"- {key}: {value}" for key, value in header.items()]
    for _, group in groupby(rows, key=lambda row: row["case"]):
        lines += ["", *_case_table(list(group))]
    return "\n".join(lines).strip() + "\n"


def page(header: Mapping[str, str], columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Header as a list, then one table."""
    return document(header, []) + "\n" + "\n".join(table(columns, rows)) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """Lines of one Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [
        "| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines
    ]


def _case_table(rows: list[dict]) -> list[str]:
    label = ", ".join(f"{key} {value}" for key, value in rows[0]["case"].items() if key != "op")
    modes = list(dict.fromkeys(mode for row in rows for mode in row["times"]))
    has_host = any(row.get("host_ms") for row in rows)
    columns = ["provider", "rank"]
    for mode in modes:
        columns += [f"{mode} ms (p20-p80)", "x baseline", "x bound"] + ["host ms"] * has_host
    columns += ["peak extra MiB", "error (of the library's GEMM)", "remarks"]
    cells = []
    for row in rows:
        cells.append([row["provider"], str(row["rank"] or "-")])
        for mode in modes:
            cells[-1] += _time_cells(row["times"].get(mode))
            host = row.get("host_ms", {}).get(mode)
            cells[-1] += ["-" if host is None else f"{host:.2f}"] * has_host
        cells[-1] += [_peak(row), errors(row), _remarks(row)]
    return [f"**{rows[0]['case'].get('op', '')}**: {label}", "", *table(columns, cells)]


def _time_cells(time: dict[str, float] | None) -> list[str]:
    if time is None:
        return ["-"] * 3
    ratios = [f"{time[key]:.2f}" if key in time else "-" for key in ("x_baseline", "x_bound")]
    return [f"{time['median_ms']:.4g} ({time['p20_ms']:.4g}-{time['p80_ms']:.4g})", *ratios]


def _peak(row: dict) -> str:
    peaks = [value for value in row["peak_extra_mib"].values() if value is not None]
    return f"{max(peaks):.1f}" if peaks else "-"


def errors(row: dict) -> str:
    """Each error, and in brackets that of the library's float32-output GEMM (cuBLAS on a GPU)."""
    parts = []
    for name, error in row["errors"].items():
        library = error.get("library")
        parts.append(f"{name} {error['value']:.1e}")
        parts[-1] += "" if library is None else f" ({library:.1e})"
    return ", ".join(parts) or "-"


def _remarks(row: dict) -> str:
    state = row["status"] if row["status"] not in ("ok", "bound") else ""
    parts = [": ".join(part for part in (state, row["reason"]) if part)]
    parts.append(f"cannot: {row['cannot']}" if row["cannot"] else "")
    parts.append("preliminary" if row.get("is_preliminary") else "")
    return "; ".join(part for part in parts if part)
