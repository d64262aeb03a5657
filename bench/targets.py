"""Every target of the project: what it asks, what was measured, met or not.

    python -m bench.targets FOLDER [FOLDER ...]     reads all result files in the folders

A later folder replaces an earlier one's value; a target that no file holds is "not measured".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.markdown import table

BIG = "qwen2.5-7b"
# The implementation that `auto` takes on a GPU of this kind: Triton, else chunked.
OURS = ("ours triton", "ours chunked")
# The first needs a configuration library.
STEPS = ("laser_fast", "body + kernel")


@dataclass(frozen=True)
class Measured:
    """A value, how to show it, and where it was measured."""

    value: float
    text: str
    device: str


@dataclass(frozen=True)
class Target:
    """`find` looks for the value in one result file; lower is better."""

    name: str
    limit: float
    limit_text: str
    find: Callable[[dict], Measured | None]


def _row(result: dict, provider: str, mode: str, **case: object) -> dict | None:
    for row in result["rows"]:
        found = row.get("case", {})
        is_case = all(found.get(key) == value for key, value in case.items())
        if is_case and row["provider"] == provider and mode in row["times"]:
            return row
    return None


def _first(result: dict, providers: Sequence[str], mode: str, **case: object) -> dict | None:
    rows = (_row(result, provider, mode, **case) for provider in providers)
    return next((row for row in rows if row), None)


def _text(row: dict, text: str) -> str:
    note = f", {row['status']}" if row["status"] != "ok" else ""
    return f"{text} ({row['provider']}{note})"


def _ratio(
    key: str, mode: str, providers: Sequence[str] = OURS, **case: object
) -> Callable[[dict], Measured | None]:
    """Time relative to the bound or the baseline; a wrong result meets nothing."""

    def find(result: dict) -> Measured | None:
        row = _first(result, providers, mode, **case)
        if row is None or key not in row["times"][mode]:
            return None
        value = row["times"][mode][key]
        is_wrong = row["status"] == "wrong"
        text = _text(row, f"{value:.2f}x")
        return Measured(float("inf") if is_wrong else value, text, result["header"]["device"])

    return find


def _peak_gib(result: dict) -> Measured | None:
    case = {"op": "linear_logprob_loss", "shape": BIG, "N": 32768}
    row = _first(result, OURS, "fwd+bwd", **case)
    if row is None:
        return None
    value = row["peak_extra_mib"]["fwd+bwd"] / 1024
    text = f"{value:.2f} GiB"
    if plain := _row(result, "unfused", "fwd+bwd", **case):
        text += f", unfused {plain['peak_extra_mib']['fwd+bwd'] / 1024:.1f} GiB"
    return Measured(value, _text(row, text), result["header"]["device"])


def _cuda_over_triton(op: str, num_rows: int) -> Callable[[dict], Measured | None]:
    def find(result: dict) -> Measured | None:
        case = {"op": op, "shape": BIG, "N": num_rows}
        pair = [_row(result, f"ours {impl}", "fwd+bwd", **case) for impl in ("cuda", "triton")]
        if None in pair or "wrong" in {row["status"] for row in pair}:
            return None
        cuda, triton = (row["times"]["fwd+bwd"]["median_ms"] for row in pair)
        return Measured(cuda / triton, f"{cuda / triton:.2f}x", result["header"]["device"])

    return find


def _cpu_memory(result: dict) -> Measured | None:
    names = ("ours chunked", "unfused logits held", "unfused")
    case = {"op": "linear_logprob_loss", "shape": "cpu"}
    rows = [_row(result, name, "fwd+bwd", **case) for name in names]
    if None in rows:
        return None
    ours, held, lean = (row["peak_extra_mib"]["fwd+bwd"] for row in rows)
    text = f"{ours / held:.3f}x ({ours:.0f} of {held:.0f} MiB; {ours / lean:.3f}x of {lean:.0f} MiB"
    text += " where no logits are held)"
    return Measured(ours / held, text, result["header"]["device"])


def _inline(result: dict) -> dict | None:
    """The row of inline scores in a full run of bench.rollout_score."""
    if result["header"].get("op") != "rollout_score" or "smoke" in result["header"]["case"]:
        return None
    return next((row for row in result["rows"] if row["way"] == "inline"), None)


def _inline_tokens(result: dict) -> Measured | None:
    if (row := _inline(result)) is None:
        return None
    value = row["extra_tokens_per_completion"]
    return Measured(value, f"{value:.2f}", result["header"]["device"])


def _inline_time(result: dict) -> Measured | None:
    if (row := _inline(result)) is None:
        return None
    wall, cpu = row["wall"]["extra"], row["cpu"]["extra"]
    return Measured(wall, f"{wall:+.1%} ({cpu:+.1%} CPU time)", result["header"]["device"])


def _gpu_tests(result: dict) -> Measured | None:
    if result["header"].get("op") != "gpu_tests":
        return None
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for row in result["rows"]:
        counts[row["outcome"]] += 1
    if not counts["passed"] + counts["failed"]:
        return None
    text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return Measured(counts["failed"], text, result["header"]["device"])


LOSS = {"op": "linear_logprob_loss", "shape": BIG, "N": 8192}
SCORING = {"op": "linear_logprob", "shape": BIG, "N": 8192}
LAST = {"op": "last_token", "shape": BIG, "N": 64}
TARGETS = (
    Target("GPU tests that fail", 0, "0", _gpu_tests),
    Target(
        "linear_logprob_loss fwd+bwd, 7B head, N 8192, over three bare GEMMs",
        1.08,
        "1.08x",
        _ratio("x_bound", "fwd+bwd", **LOSS),
    ),
    Target(
        "the same over the unfused baseline",
        0.65,
        "0.65x",
        _ratio("x_baseline", "fwd+bwd", **LOSS),
    ),
    Target(
        "scoring, 7B head, N 8192, over one bare GEMM",
        1.10,
        "1.10x",
        _ratio("x_bound", "fwd", **SCORING),
    ),
    Target(
        "last_token_loss fwd, 7B head, B 64, over reading W once",
        1.25,
        "1.25x",
        _ratio("x_bound", "fwd", **LAST),
    ),
    Target(
        "last_token_loss fwd+bwd, 7B head, B 64, over its memory floor",
        1.35,
        "1.35x",
        _ratio("x_bound", "fwd+bwd", **LAST),
    ),
    Target("peak extra memory, 7B head, N 32768", 4.0, "4 GiB", _peak_gib),
    Target(
        "impl=cuda over impl=triton, linear_logprob_loss, 7B head, N 8192 (else not in auto)",
        0.95,
        "0.95x",
        _cuda_over_triton("linear_logprob_loss", 8192),
    ),
    Target(
        "impl=cuda over impl=triton, last_token, 7B head, B 64 (else not in auto)",
        0.95,
        "0.95x",
        _cuda_over_triton("last_token", 64),
    ),
    Target(
        "linear_logprob_loss on a CPU, time over unfused",
        0.85,
        "0.85x",
        _ratio("x_baseline", "fwd+bwd", op="linear_logprob_loss", shape="cpu"),
    ),
    Target("linear_logprob_loss on a CPU, memory over unfused", 0.15, "0.15x", _cpu_memory),
    Target(
        "quickstart's training step over plain logits",
        1.0,
        "1.00x",
        _ratio("x_baseline", "step", STEPS, op="train_step", shape="quickstart"),
    ),
    Target(
        "training step of a 1.5B model over plain logits",
        1.0,
        "1.00x",
        _ratio("x_baseline", "step", STEPS, op="train_step", shape="qwen2.5-1.5b"),
    ),
    Target("generated tokens per inline score", 1.0, "1.00", _inline_tokens),
    Target("generation time of inline scores", 0.05, "+5.0%", _inline_time),
)


def read(folders: Iterable[Path]) -> list[dict]:
    """All result files, folders in order, files by name."""
    paths = [path for folder in folders for path in sorted(Path(folder).glob("*.json"))]
    return [json.loads(path.read_text()) for path in paths]


def report(results: Sequence[dict]) -> list[str]:
    """The table's lines."""
    lines = []
    for target in TARGETS:
        found = [measured for result in results if (measured := target.find(result))]
        if not found:
            lines.append([target.name, target.limit_text, "not measured", "-", "-"])
            continue
        last = found[-1]
        is_met = "met" if last.value <= target.limit else "NOT met"
        lines.append([target.name, target.limit_text, last.text, is_met, last.device])
    return table(["target", "at most", "measured", "", "on"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folders", nargs="+", type=Path)
    print("\n".join(report(read(options.parse_args(argv).folders))))


if __name__ == "__main__":
    main()
