"""List every target of the project: what was predicted, what was measured, and whether it is met.

    python -m bench.targets FOLDER [FOLDER ...]     reads all result files in the folders

A target has a line for every card that measured it, of which a later folder's value replaces an
earlier one's; a target that no file holds is "not measured". A file with rows {"target": name,
"card": "H200", "predicted": ratio} holds predictions, shown beside what that card measured.
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
# The first of these needs a configuration library.
STEPS = ("laser_fast", "body + kernel")


@dataclass(frozen=True)
class Measured:
    """A value, how to show it, where it was measured, and what follows if that is no verdict."""

    value: float
    text: str
    device: str
    consequence: str = ""


@dataclass(frozen=True)
class Target:
    """`find` looks for the value in one result file; lower is better, and most are ratios."""

    name: str
    limit: float
    find: Callable[[dict], Measured | None]
    limit_text: str = ""

    @property
    def at_most(self) -> str:
        """The limit as the table shows it."""
        return self.limit_text or f"{self.limit:.2f}x"

    def verdict(self, measured: Measured) -> str:
        """Whether the target is met, or what follows from the value."""
        return measured.consequence or ("met" if measured.value <= self.limit else "NOT met")


def _row(result: dict, provider: str, mode: str, **case: object) -> dict | None:
    for row in result["rows"]:
        found = row.get("case")
        if not isinstance(found, dict):  # of a benchmark that has no providers
            continue
        is_case = all(found.get(key) == value for key, value in case.items())
        if is_case and row["provider"] == provider and mode in row["times"]:
            return row
    return None


def _first(result: dict, providers: Sequence[str], mode: str, **case: object) -> dict | None:
    rows = (_row(result, provider, mode, **case) for provider in providers)
    return next((row for row in rows if row), None)


def _measured(result: dict, row: dict, value: float, text: str) -> Measured:
    """A row's value; a wrong result meets nothing."""
    notes = [row["provider"], *([row["status"]] if row["status"] != "ok" else [])]
    notes += ["preliminary"] if row.get("is_preliminary") else []
    value = float("inf") if row["status"] == "wrong" else value
    return Measured(value, f"{text} ({', '.join(notes)})", result["header"]["device"])


def _ratio(
    key: str, mode: str, providers: Sequence[str] = OURS, **case: object
) -> Callable[[dict], Measured | None]:
    """Time relative to the baseline, to the slowest bound, or to the provider that `key` names."""

    def find(result: dict) -> Measured | None:
        row = _first(result, providers, mode, **case)
        if row is None:
            return None
        value = row["times"][mode].get(key)
        if other := _row(result, key, mode, **case):
            value = row["times"][mode]["median_ms"] / other["times"][mode]["median_ms"]
        return None if value is None else _measured(result, row, value, f"{value:.2f}x")

    return find


def _worse(*finders: Callable[[dict], Measured | None]) -> Callable[[dict], Measured | None]:
    """The largest value, if all are there."""

    def find(result: dict) -> Measured | None:
        found = [measured for finder in finders if (measured := finder(result))]
        complete = len(found) == len(finders)
        return max(found, key=lambda measured: measured.value) if complete else None

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
    return _measured(result, row, value, text)


def _choice(mode: str, **case: object) -> Callable[[dict], Measured | None]:
    """Which of two implementations `auto` should take on Hopper: the faster one by 5%."""

    def find(result: dict) -> Measured | None:
        rows = [_row(result, f"ours {impl}", mode, **case) for impl in ("triton", "cuda")]
        if None in rows or "wrong" in {row["status"] for row in rows}:
            return None
        triton, cuda = (row["times"][mode]["median_ms"] for row in rows)
        winner, gain = ("cuda", triton / cuda) if cuda < triton else ("triton", cuda / triton)
        text = f"{winner} by {gain - 1:.0%} ({triton:.4g} ms triton, {cuda:.4g} ms cuda)"
        rule = f"auto takes {winner}" if gain >= 1.05 else "auto stays as it is"
        return Measured(gain, text, result["header"]["device"], rule)

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
LAST = {"op": "last_token", "shape": BIG}
CHOICE = "the faster of triton and cuda on Hopper: {}, 7B head, {}"
TARGETS = (
    Target("GPU tests that fail", 0, _gpu_tests, "0"),
    Target(
        "linear_logprob_loss fwd+bwd, 7B head, N 8192, over three bare GEMMs",
        1.08,
        _ratio("x_bound", "fwd+bwd", **LOSS),
    ),
    Target("the same over the unfused baseline", 0.65, _ratio("x_baseline", "fwd+bwd", **LOSS)),
    Target(
        "scoring, 7B head, N 8192, over one bare GEMM", 1.10, _ratio("x_bound", "fwd", **SCORING)
    ),
    Target(
        "last_token_loss fwd, 7B head, B 64, over reading W once",
        1.25,
        _ratio("stream of W", "fwd", **LAST, N=64),
    ),
    Target(
        "last_token_loss fwd+bwd, 7B head, B 64, over its memory floor",
        1.35,
        _ratio("stream of W", "fwd+bwd", **LAST, N=64),
    ),
    *(
        Target(
            f"last_token_loss, 7B head, B {num_rows}, over the slower of W's stream and GEMMs",
            1.30,
            _worse(*(_ratio("x_bound", mode, **LAST, N=num_rows) for mode in ("fwd", "fwd+bwd"))),
        )
        for num_rows in (128, 256, 512, 1024)
    ),
    Target("peak extra memory, 7B head, N 32768", 4.0, _peak_gib, "4 GiB"),
    *(
        Target(CHOICE.format(name, size), 1.05, _choice(mode, **case), "5% decides")
        for name, size, mode, case in (
            ("loss fwd+bwd", "N 8192", "fwd+bwd", LOSS),
            ("scoring", "N 8192", "fwd", SCORING),
            ("last token fwd+bwd", "B 64", "fwd+bwd", LAST | {"N": 64}),
        )
    ),
    Target(
        "linear_logprob_loss on a CPU, time over unfused",
        0.85,
        _ratio("x_baseline", "fwd+bwd", op="linear_logprob_loss", shape="cpu"),
    ),
    Target("linear_logprob_loss on a CPU, memory over unfused", 0.15, _cpu_memory),
    Target(
        "quickstart's training step over plain logits",
        1.0,
        _ratio("x_baseline", "step", STEPS, op="train_step", shape="quickstart"),
    ),
    Target(
        "training step of a 1.5B model over plain logits",
        1.0,
        _ratio("x_baseline", "step", STEPS, op="train_step", shape="qwen2.5-1.5b"),
    ),
    Target("generated tokens per inline score", 1.0, _inline_tokens, "1.00"),
    Target("generation time of inline scores", 0.05, _inline_time, "+5.0%"),
)


def read(folders: Iterable[Path]) -> list[dict]:
    """All result files, folders in order, files by name."""
    paths = [path for folder in folders for path in sorted(Path(folder).glob("*.json"))]
    return [json.loads(path.read_text()) for path in paths]


def report(results: Sequence[dict]) -> list[str]:
    """The table's lines."""
    predictions = [row for result in results for row in result["rows"] if "predicted" in row]
    if unknown := {row["target"] for row in predictions} - {target.name for target in TARGETS}:
        raise ValueError(f"expected predictions of targets, got {sorted(unknown)}")
    lines = []
    for target in TARGETS:
        found = [measured for result in results if (measured := target.find(result))]
        of_target = [row for row in predictions if row["target"] == target.name]
        by_device = {measured.device: measured for measured in found}
        for device, measured in by_device.items():
            predicted = _predicted(row for row in of_target if row["card"] in device)
            verdict = target.verdict(measured)
            lines.append([target.name, target.at_most, predicted, measured.text, verdict, device])
        if not found:
            predicted = _predicted(of_target)
            lines.append([target.name, target.at_most, predicted, "not measured", "-", "-"])
    return table(["target", "at most", "predicted", "measured", "", "on"], lines)


def _predicted(rows: Iterable[dict]) -> str:
    return ", ".join(f"{r['predicted']:.2f} {r['impl']} on {r['card']}" for r in rows) or "-"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folders", nargs="+", type=Path)
    print("\n".join(report(read(options.parse_args(argv).folders))))


if __name__ == "__main__":
    main()
