"""What compilers make of the GPU kernels, and how fast that should be: no GPU is needed.

    python -m bench.machine_code                                    tables on standard output
    python -m bench.machine_code --json bench/results/predicted_sm90.json

Triton's kernels are compiled as the ops launch them for the 7B head, for sm_90 and sm_100; csrc/ by
nvcc for sm_90a. `bench/sass.py` counts, `bench/cost.py` has the arithmetic and its constants. The
times are predictions, for Hopper only: central (optimistic - pessimistic). They hold for the Triton
that is named; images with a GPU have 3.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch

from bench import cost, csrc, runner, sass
from bench.compiled import cuda_kernels, is_gemm, shipped, triton_kernel
from bench.cost import CENTRAL, JUDGEMENTS, Kernel
from bench.harness import Unavailable
from bench.markdown import document, table
from bench.offline import SHAPE
from bench.predictions import Predictor, predict
from bench.provenance import header, save

KERNEL_COLUMNS = {
    "kernel": "kernel",
    "registers": "registers",
    "spilled bytes": "spilled_bytes",
    "shared memory": "shared_bytes",
    "tensor instructions a step": "tensor_a_step",
    "TMA loads a step": "loads_a_step",
    "bytes of TMA a step": "stage_bytes",
    "instructions a step": "step",
    "prologue": "prologue",
    "epilogue": "epilogue",
    "epilogue a logit": "epilogue_a_logit",
    "most frequent in it": "epilogue_classes",
}
CLOCK_COLUMNS = ("kernel", "step", "main loop", "exp2", "ALU", "issue", "epilogue", "exposed")
TARGET_COLUMNS = ("target", "at most", "card", "impl", "predicted", "ms", "", "what it would need")


def kernel_row(kernel: Kernel, arch: int, used_by: str) -> dict:
    """What a compiler made of a kernel; instructions are those of one warp."""
    parts, code = kernel.code.parts, kernel.code
    return {
        "kernel": kernel.label,
        "arch": arch,
        "used_by": used_by,
        "registers": code.registers,
        "spilled_bytes": code.spilled_bytes,
        "shared_bytes": kernel.shared_bytes,
        "tensor_a_step": sass.count(parts.step, *sass.TENSOR),
        "loads_a_step": sass.count(parts.step, sass.TMA_LOAD),
        "in_flight": parts.in_flight,
        "is_flat": parts.is_flat,
        "stage_bytes": kernel.stage_bytes,
        "step": sum(parts.step.values()),
        "prologue": sum(parts.prologue.values()),
        "epilogue": sum(parts.epilogue.values()),
        "epilogue_a_logit": round(kernel.instructions_per_logit(), 2),
        "epilogue_classes": cost.classes(parts.epilogue),
    }


def clock_line(kernel: Kernel) -> list:
    """Predicted clocks of a tile."""
    steps = ceil(SHAPE.hidden_size / kernel.d)
    busy = kernel.busy()
    exposed = [kernel.exposed_clocks(steps, guess) for guess in JUDGEMENTS]
    return [
        kernel.label,
        f"{kernel.step_clocks():.0f}",
        f"{steps * kernel.step_clocks():.0f}",
        *(f"{busy[pipe]:.0f}" for pipe in ("exp2", "ALU", "issue")),
        f"{kernel.epilogue_clocks(CENTRAL):.0f}",
        f"{exposed[0]:.0f} ({exposed[1]:.0f} - {exposed[2]:.0f})",
    ]


def target_line(row: dict) -> list:
    """A prediction beside its target."""
    return [
        row["target"],
        f"{row['target_ratio']:.2f}x",
        row["card"],
        row["impl"],
        f"{row['predicted']:.2f}x ({row['lowest']:.2f} - {row['highest']:.2f})",
        f"{row['ms']:.2f}",
        "met" if row["met"] else "MISSED",
        "" if row["met"] else needed(row),
    ]


def needed(row: dict) -> str:
    """How much time must go, and where it is."""
    less = row["ms"] - row["target_ratio"] * row["bound_ms"]
    causes = {k: v for k, v in row["by_cause_ms"].items() if k not in ("GEMM", "stream")}
    largest = sorted(causes.items(), key=lambda item: -item[1])[:4]
    listed = ", ".join(f"{cause} {ms:.2f}" for cause, ms in largest)
    return f"{less:.2f} ms less of {row['slower_op']}; beyond the floor: {listed}"


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Compile, predict, print and write; returns the rows: kernels, then predictions."""
    smoke = "sm_90 only, nothing of csrc/, no options of the ops"
    args = runner.base_parser(__doc__, smoke=smoke).parse_args(argv)
    facts = {"op": "machine_code"} | header(torch.device("cpu"))
    impls, cuda = ["triton"], {}
    if not args.smoke:
        try:
            cuda = cuda_kernels()
            facts["nvcc"] = csrc.version()
            impls.append("cuda")
        except Unavailable as error:
            facts["nvcc"] = str(error)
    rows, lines = [], []
    for arch in (90,) if args.smoke else (90, 100):
        every = shipped(arch, all_cases=not args.smoke)
        tiles = [x for x in every if is_gemm(x.launch) and x.launch.arguments["TMA"]]
        kernels = [(triton_kernel(x.launch, x.code, x.name), x.used_by) for x in tiles]
        kernels += [(kernel, "csrc") for kernel in cuda.values()] if arch == 90 else []
        new = [kernel_row(kernel, arch, used_by) for kernel, used_by in kernels]
        rows += new
        cells = ([row[key] for key in KERNEL_COLUMNS.values()] for row in new)
        lines += ["", f"**sm_{arch}: tiles by TMA**", "", *table([*KERNEL_COLUMNS], cells)]
        if arch == 90:
            cells = [clock_line(kernel) for kernel, _ in kernels]
            lines += ["", "**sm_90: predicted clocks of a tile, D 3584**", ""]
            lines += table(CLOCK_COLUMNS, cells)
        others = [
            [x.name, x.code.registers, x.code.spilled_bytes, x.launch.compiled.metadata.shared]
            for x in every
            if x not in tiles
        ]
        lines += ["", f"**sm_{arch}: other kernels**", ""]
        lines += table([*KERNEL_COLUMNS][:4], others)
    predictions = predict(Predictor(cuda), impls)
    lines += ["", "**Predictions**: central (lowest - highest); nothing of it is measured", ""]
    lines += table(TARGET_COLUMNS, map(target_line, predictions))
    text = document(facts, []) + "\n".join(lines) + "\n"
    print(text)
    if args.json:
        save(args.json, facts, rows + predictions, text)
    return rows + predictions


if __name__ == "__main__":
    main()
