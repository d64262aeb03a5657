"""Show what the library's GEMM loses in a logit that its sum builds up term by term.

python -m bench.truncation [--smoke] [--json FILE]

Each row of hidden states is a multiple of the weight of its label, so that the logit grows to |z|
step by step, as that of a token that a model is certain of. An accumulator that is rounded to
nearest errs on both sides; a tensor core's, which is cut toward zero, only makes |z| smaller, by
about D/16 2^-25 |z|. The tolerances of bench/exact.py rest on that. No kernel of ours runs here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bench import runner
from bench.exact import library_logits
from bench.provenance import header

HIDDEN_SIZES = (1024, 1536, 3584, 4096)
LOGITS = (20.0, -20.0, 30.0, 70.0)
NUM_ROWS, VOCABULARY = 128, 4096
COLUMNS = ["D", "z", "too small by", "at most", "smaller in", "predicted"]


def errors(hidden_sizes: Sequence[int], device: torch.device) -> Iterator[dict]:
    """For every D and z: by how much |z| comes out too small, and in which share of the rows."""
    rng = torch.Generator(device).manual_seed(0)
    for hidden_size in hidden_sizes:
        weight = torch.randn(VOCABULARY, hidden_size, device=device, generator=rng)
        weight = (weight / hidden_size**0.5).bfloat16()
        for logit in LOGITS:
            hidden_states = (logit * weight[:NUM_ROWS]).bfloat16()
            exact = (hidden_states.double() * weight[:NUM_ROWS].double()).sum(1)
            found = library_logits(hidden_states, weight)[:, :NUM_ROWS].diagonal().double()
            lost = exact.abs() - found.abs()
            yield {
                "D": hidden_size,
                "z": logit,
                "too small by": lost.mean().item(),
                "at most": lost.max().item(),
                "smaller in": (lost > 0).double().mean().item(),
                "predicted": hidden_size / 16 * 2**-25 * abs(logit),
            }


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measure, print and write; returns the rows."""
    args = runner.base_parser(__doc__, smoke="the smallest D on a CPU").parse_args(argv)
    device = runner.device_of(args)
    rows = list(errors(HIDDEN_SIZES[: 1 if args.smoke else None], device))
    cells = [
        [row["D"], row["z"], *(f"{row[name]:.1e}" for name in COLUMNS[2:4])]
        + [f"{row['smaller in']:.0%}", f"{row['predicted']:.1e}"]
        for row in rows
    ]
    facts = {"op": "truncation"} | header(device)
    return runner.publish(args, facts, COLUMNS, cells, rows)


if __name__ == "__main__":
    main()
