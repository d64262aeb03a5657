"""Where the time of our fwd+bwd goes, kernel by kernel, from torch's profiler.

python -m bench.profile_kernels [--shapes qwen2.5-7b] [--rows 8192] [--smoke] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from bench import last_token, linear_logprob, linear_logprob_loss, runner
from bench.harness import Unavailable
from bench.markdown import document, table
from bench.provenance import header, save
from bench.shapes import SHAPES, make_input_sets

OPS = (linear_logprob_loss, linear_logprob, last_token)
LAST_TOKEN_ROWS = 64
CALLS = 3
KERNELS_SHOWN = 10


def profiled(shape: str, num_rows: int, device: torch.device) -> Iterator[dict]:
    """Kernels of every op and implementation that runs here, slowest first, the rest in one row."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for op in OPS:
        rows = min(num_rows, LAST_TOKEN_ROWS) if op is last_token else num_rows
        sets = make_input_sets(SHAPES[shape], rows, dtype, device)
        for entry in op.entries(sets):
            if entry.name not in ("ours chunked", "ours triton", "ours cuda"):
                continue
            name = op.__name__.removeprefix("bench.")
            try:
                call = entry.prepare().calls["fwd+bwd"]
                call(0)
            except (Unavailable, RuntimeError) as error:
                yield {"op": name, "N": rows, "provider": entry.name, "reason": str(error)}
                continue
            for kernel in _kernels(call, device):
                yield {"op": name, "N": rows, "provider": entry.name, **kernel}


def _kernels(call, device: torch.device) -> list[dict]:
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for number in range(CALLS):
            call(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
    kind = "device" if device.type == "cuda" else "cpu"
    spent = {
        event.key: (getattr(event, f"self_{kind}_time_total"), event.count)
        for event in profiler.key_averages()
    }
    slowest = sorted(spent.items(), key=lambda item: -item[1][0])
    shown, others = slowest[:KERNELS_SHOWN], slowest[KERNELS_SHOWN:]
    if others:
        times, counts = zip(*(parts for _, parts in others), strict=True)
        shown.append((f"{len(others)} others", (sum(times), sum(counts))))
    total = sum(microseconds for _, (microseconds, _) in shown) or 1.0
    return [
        {
            "kernel": key[:80],
            "calls": count / CALLS,
            "ms": microseconds / 1e3 / CALLS,
            "share": microseconds / total,
        }
        for key, (microseconds, count) in shown
    ]


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Profile, print and write; returns the rows."""
    options = runner.parser(__doc__)
    options.set_defaults(rows="8192")
    args = options.parse_args(argv)
    device = runner.device_of(args)
    shape, num_rows = ("smoke", 200) if args.smoke else (args.shapes, int(args.rows))
    rows = list(profiled(shape, num_rows, device))
    facts = {"op": "profile_kernels", "shape": shape} | header(device)
    columns = ["op", "N", "provider", "kernel", "calls", "ms", "share", "reason"]
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    text = document(facts, []) + "\n" + "\n".join(table(columns, cells)) + "\n"
    print(text)
    if args.json:
        save(args.json, facts, rows, text)
    return rows


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
