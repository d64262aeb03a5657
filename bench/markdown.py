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
    columns = ["provider", "rank"]
    for mode in modes:
        columns += [f"{mode} ms (p20-p80)", "x baseline", "x bound"]
    columns += ["peak extra MiB", "error", "remarks"]
    return [
        f"**{rows[0]['case'].get('op', '')}**: {label}",
        "",
        *table(columns, map(_cells(modes), rows)),
    ]


def _cells(modes: list[str]):
    def cells(row: dict) -> list[str]:
        line = [row["provider"], str(row["rank"] or "-")]
        for mode in modes:
            time = row["times"].get(mode)
            line += _time_cells(time) if time else ["-"] * 3
        return [*line, _peak(row), _errors(row), _remarks(row)]

    return cells


def _time_cells(time: dict[str, float]) -> list[str]:
    ratios = [f"{time[key]:.2f}" if key in time else "-" for key in ("x_baseline", "x_bound")]
    return [f"{time['median_ms']:.4g} ({time['p20_ms']:.4g}-{time['p80_ms']:.4g})", *ratios]


def _peak(row: dict) -> str:
    peaks = [value for value in row["peak_extra_mib"].values() if value is not None]
    return f"{max(peaks):.1f}" if peaks else "-"


def _errors(row: dict) -> str:
    return ", ".join(f"{name} {error['value']:.1e}" for name, error in row["errors"].items()) or "-"


def _remarks(row: dict) -> str:
    state = row["status"] if row["status"] not in ("ok", "bound") else ""
    parts = [": ".join(part for part in (state, row["reason"]) if part)]
    if row["cannot"]:
        parts.append(f"cannot: {row['cannot']}")
    return "; ".join(part for part in parts if part)
