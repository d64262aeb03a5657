"""Measure providers of one operation on equal terms.

Three separate passes, so that none disturbs another:

    error    against float64; a provider above its tolerance is "wrong", shown but not ranked
    memory   peak beyond what is held before the call, gradients included
    time     every provider once per round, in rotating order: medians over rounds with p20 and
             p80, ratios as medians of per-round ratios, so that clocks and neighbours cancel

Bounds (bare GEMMs, the weight's stream) are timed in the same rounds. Whatever a provider raises
becomes its row's reason, and the run goes on. What ends the process is another matter: each
provider is first timed for a few rounds against the bounds alone, and its row is handed out, before
the next one runs; the rounds of all together come last and replace those "preliminary" numbers.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")
Call = Callable[[int], object]  # its number, by which inputs rotate, -> result, dropped
Clock = Callable[[Callable[[], object]], float]  # seconds of one call

# A device that spins this long while the host enqueues hides launch latency, as a queue of
# earlier work does in training; about 2 ms. What is hidden is reported as host_ms.
SPIN_CYCLES = 4_000_000


class Unavailable(Exception):  # noqa: N818 (a state of this machine, not an error)
    """A provider cannot run here; the message says why."""


class Error(NamedTuple):
    """Distance from the float64 result, how much is allowed, and what the library's GEMM loses."""

    value: float
    tolerance: float
    library: float | None = None

    @property
    def is_wrong(self) -> bool:
        """Also true for NaN."""
        return not self.value <= self.tolerance


class Budget(NamedTuple):
    """How long to time one mode of one case: `seconds`, within limits on the rounds.

    Memory is the median of `memory_repeats`, because a host's allocator keeps now more and now
    fewer pieces of what was freed. A GPU's allocator repeats itself, so it is asked once.
    """

    seconds: float = 2.0
    min_rounds: int = 7
    max_rounds: int = 100
    memory_repeats: int = 3


@dataclass(frozen=True)
class Run:
    """A provider with its inputs: one call per mode, and the check of its results."""

    calls: dict[str, Call]
    errors: Callable[[], dict[str, Error]] = dict
    scale: dict[str, float] = field(default_factory=dict)  # a bound's share of its own call


@dataclass(frozen=True)
class Entry:
    """One row of the table before it is measured; `prepare` imports and may raise."""

    name: str
    prepare: Callable[[], Run]
    cannot: str = ""  # which part of the job the provider cannot do
    is_bound: bool = False
    does_job: bool = True  # False: it does a smaller job, so it is shown and not ranked


@dataclass(frozen=True)
class Case:
    """One op at one size. The last mode is the one that ranks."""

    label: dict[str, object]  # shape, N, D, V, dtype
    modes: Sequence[str]
    entries: Sequence[Entry]
    baseline: str
    device: torch.device


@dataclass
class Row:
    """One provider at one case, as written to JSON."""

    case: dict[str, object]
    provider: str
    cannot: str = ""
    status: str = "ok"  # ok, bound, wrong, skipped, crashed
    reason: str = ""
    rank: int | None = None
    errors: dict[str, Error] = field(default_factory=dict)
    peak_extra_mib: dict[str, float | None] = field(default_factory=dict)
    host_ms: dict[str, float] = field(default_factory=dict)  # of a GPU's calls: until they return
    times: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Plain JSON values; errors by name with value and tolerance."""
        return asdict(self) | {"errors": {k: v._asdict() for k, v in self.errors.items()}}


def measure(
    case: Case,
    budget: Budget,
    *,
    clock: Clock | None = None,
    on_start: Callable[[str], None] = lambda name: None,
    on_rows: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Run all passes of a case.

    `on_start` hears which provider's code runs next, "" for none; `on_rows` the preliminary rows.
    """
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    clock = clock or clock_of(case.device)
    few_rounds = budget._replace(seconds=0.0, min_rounds=(budget.min_rounds + 1) // 2)

    def time_modes(names: Sequence[str], budget: Budget) -> None:
        for mode in case.modes:
            calls = {n: runs[n].calls[mode] for n in names if mode in runs[n].calls}
            samples = time_rounds(calls, rows, budget, clock, on_start)
            samples = {
                name: [value * runs[name].scale.get(mode, 1) for value in values]
                for name, values in samples.items()
            }
            _summarise(mode, samples, rows, case.baseline)

    for entry in case.entries:
        row = rows[entry.name] = Row(case.label, entry.name, entry.cannot)
        on_start(entry.name)
        run = _attempt(row, partial(_prepare, entry, row, case.device, budget))
        if run:
            runs[entry.name] = run
        if on_rows:
            if run and not entry.is_bound:
                bounds = [name for name in runs if rows[name].status == "bound"]
                time_modes([*bounds, entry.name], few_rounds)
            on_rows(list(rows.values()))
    time_modes([name for name in runs if rows[name].status in ("ok", "bound", "wrong")], budget)
    on_start("")
    _rank(case, rows)
    return list(rows.values())


def _prepare(entry: Entry, row: Row, device: torch.device, budget: Budget) -> Run:
    """The error and the memory pass."""
    repeats = 1 if device.type == "cuda" else budget.memory_repeats
    run = entry.prepare()
    row.errors = run.errors()
    for mode, call in run.calls.items():
        call(0)  # warm: compilers, library handles, allocators
        row.peak_extra_mib[mode] = _peak_extra_mib(partial(call, 0), device, repeats)
        if device.type == "cuda":
            row.host_ms[mode] = 1e3 * min(_host_seconds(partial(call, 0)) for _ in range(3))
            torch.cuda.synchronize()
    row.status = "bound" if entry.is_bound else "ok"
    if wrong := [name for name, error in row.errors.items() if error.is_wrong]:
        row.status, row.reason = "wrong", f"error above tolerance: {', '.join(wrong)}"
    return run


def time_rounds(
    calls: dict[str, Call],
    rows: dict[str, Row],
    budget: Budget,
    clock: Clock,
    on_start: Callable[[str], None],
) -> dict[str, list[float]]:
    """Seconds per round of every provider; one that raises is dropped, its row says why."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent, number, rounds = 0.0, 0, 0
    while samples and rounds < budget.max_rounds:
        if rounds >= budget.min_rounds and spent >= budget.seconds:
            break
        names = list(samples)
        start = rounds % len(names)
        for name in names[start:] + names[:start]:
            on_start(name)
            seconds = _attempt(rows[name], partial(clock, partial(calls[name], number)))
            number += 1
            if seconds is None:
                del samples[name]
                continue
            samples[name].append(seconds)
            spent += seconds
        rounds += 1
    return samples


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _summarise(
    mode: str, samples: dict[str, list[float]], rows: dict[str, Row], baseline: str
) -> None:
    bounds = [values for name, values in samples.items() if rows[name].status == "bound"]
    # Several bounds hold at once: the slowest one binds.
    references = {"x_bound": [max(values) for values in zip(*bounds, strict=True)]}
    if baseline in samples:
        references["x_baseline"] = samples[baseline]
    for name, values in samples.items():
        summary = {
            "median_ms": 1e3 * quantile(values, 0.5),
            "p20_ms": 1e3 * quantile(values, 0.2),
            "p80_ms": 1e3 * quantile(values, 0.8),
            "rounds": len(values),
        }
        for key, reference in references.items():
            if reference:
                ratios = [a / b for a, b in zip(values, reference, strict=True)]
                summary[key] = quantile(ratios, 0.5)
        rows[name].times[mode] = summary


def _rank(case: Case, rows: dict[str, Row]) -> None:
    mode = case.modes[-1]
    able = {entry.name for entry in case.entries if entry.does_job}
    ranked = [r for r in rows.values() if r.status == "ok" and mode in r.times]
    ranked = [row for row in ranked if row.provider in able]
    for place, row in enumerate(sorted(ranked, key=lambda r: r.times[mode]["median_ms"]), 1):
        row.rank = place


def _attempt(row: Row, work: Callable[[], Result]) -> Result | None:
    """Run a provider's code; what it raises becomes the row's reason, unless the device is lost."""
    try:
        return work()
    except Exception as error:
        is_absent = isinstance(error, (ImportError, Unavailable)) or isinstance(
            error.__cause__, ImportError
        )
        row.status, row.reason = "skipped" if is_absent else "crashed", reason_of(error)
    # The traceback held the provider's tensors, and it is gone only now.
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.synchronize()  # raises again after an illegal access: see bench/guard.py
        torch.cuda.empty_cache()
    return None


def reason_of(error: Exception) -> str:
    """One line that says why a row has no numbers."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, Unavailable):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        return "too little memory: " + text.split(". GPU")[0]
    return f"{type(error).__name__}: {text}"[:200]


def clock_of(device: torch.device) -> Clock:
    """CUDA events on a GPU, the host's clock elsewhere."""
    return _device_seconds if device.type == "cuda" else _host_seconds


def _host_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _device_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak_extra_mib(call: Callable[[], object], device: torch.device, repeats: int) -> float | None:
    peaks = [peak_extra_bytes(call, device) for _ in range(repeats)]
    return None if None in peaks else quantile(peaks, 0.5) / 2**20


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory during the call beyond what was held before; results count.

    On a GPU this is the allocator's peak. Elsewhere it is the resident memory of this process,
    after a reset of Linux's high-water mark, and None where the system has no such mark.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak
    mark = Path("/proc/self/clear_refs")
    if not os.access(mark, os.W_OK):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else the call reuses pages that are resident already
    mark.write_text("5")
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM") - before
    del result
    return peak


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
