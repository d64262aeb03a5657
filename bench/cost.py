"""Predict the time of what an op launches on a Hopper GPU, from machine code and data sheets.

A tile of a GEMM kernel, n x v with d of D a step, costs one multiprocessor, in clocks,

    tensor cores     2 n v d / 4096 a step: 989.4e12 dense bf16 FLOP/s (NVIDIA's data sheet of the
                     H100 SXM and H200) / 132 multiprocessors / 1.83e9 Hz
    shared memory    (n / 64 (64 + v) d + (n + v) d) 2 bytes a step at 128 a clock: every wgmma
                     reads both operands, and TMA writes them
    epilogue         the most of: instructions x warps / 4 schedulers; exponentials at 16 a clock,
                     ALU (min, max, select, compare, logic, permute, pack, integer add, move) at
                     64, FP32 at 128 (CUDA programming guide, table of arithmetic throughput); times
                     a factor for stalls, which fewer warps a scheduler hide worse
    start            2 clocks an instruction of the prologue; and, unless the loop is flat and has
                     loaded the next tile's first stages before, the latency of TMA and a stage at
                     64 bytes a clock from L2

and a pass the largest of: tensor cores at the rate that the library sustains, which the power limit
sets (788e12 on an H200: linkedin/Liger-Kernel#1422); shared memory; the stages' bytes over what L2
supplies to all multiprocessors; W, once a stripe of row blocks, and what is written, over the speed
of a copy.
Epilogue and start come on top, unless another warp group computes meanwhile (ping-pong), or the
ring of stages keeps loading, which for few rows is all that matters.

A GEMM of the library runs at cuBLAS's rate, or as fast as its bytes are copied where they are more;
everything else is a launch and its bytes. `Judgement` holds what nobody can know without a GPU: an
optimistic, a central and a pessimistic guess of each. Nothing here was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from bench import sass

MULTIPROCESSORS, CLOCK = 132, 1.83e9
TENSOR_FLOP_A_CLOCK = 4096
SHARED_BYTES_A_CLOCK = 128
L2_BYTES_A_CLOCK = 64
TMA_LATENCY = 700  # clocks, from the issue to data in shared memory
MEMORY_LATENCY_MS = 0.0007
SCHEDULERS = 4
_ALU = "FMNMX FSEL FSETP SEL ISETP LOP3 PLOP3 PRMT SHF LEA F2FP IADD3 VIADD MOV P2R R2P"
# Instructions a clock and multiprocessor; what is in none of them is only issued.
PIPES = {
    "exp2": (16, ("MUFU",)),
    "ALU": (64, tuple(_ALU.split())),
    "FP32": (128, ("FFMA", "FADD", "FMUL", "IMAD")),
}


class Card(NamedTuple):
    """A GPU: bytes a second of a copy, read and write together, and cuBLAS's FLOP/s."""

    name: str
    copy: float
    gemm: float


# Copies: 90% of the data sheets' 4.8 and 3.35 TB/s. The chips are the same, hence the GEMMs.
CARDS = (Card("H200", 4.3e12, 788e12), Card("H100", 3.0e12, 788e12))


class Judgement(NamedTuple):
    """What only a GPU can tell."""

    l2: float  # bytes a second of L2: 7.9e12 is shown (triton#5461, fp8), 9.2e12 is needed
    stall: float  # of an epilogue over its busiest pipe: 1 + stall / warps a scheduler
    start: float  # of a tile's start over the sum above
    turn: int  # clocks in which the tensor cores change hands between two warp groups
    main: float  # of a main loop over cuBLAS's
    drain: float  # share of the epilogue that an HBM-bound kernel shows
    launch_us: float  # of one kernel in a stream, empty
    streaming: float  # share of a copy's speed that a GEMM of few rows reaches
    tail: float  # share of the last, partial wave of tiles that a library GEMM shows
    writing: float  # share of output beyond one 16-bit copy that a library GEMM shows


OPTIMISTIC = Judgement(9.2e12, 0.3, 0.9, 100, 1.0, 0.25, 1.8, 0.9, 0.0, 0.0)
CENTRAL = Judgement(8.5e12, 0.5, 1.0, 400, 1.02, 0.5, 2.3, 0.8, 0.5, 0.4)
PESSIMISTIC = Judgement(7.9e12, 0.7, 1.1, 1500, 1.06, 0.8, 3.0, 0.65, 1.0, 1.0)
JUDGEMENTS = (CENTRAL, OPTIMISTIC, PESSIMISTIC)


@dataclass(frozen=True)
class Kernel:
    """A GEMM kernel: its machine code, and the tile of one multiprocessor."""

    label: str
    code: sass.Code
    n: int
    v: int
    d: int
    num_warps: int  # that share a tile's epilogue
    stage_bytes: int  # from L2, a step
    shared_bytes: int
    group_rows: int  # that share one read of W from memory
    overlap: str = ""  # ping-pong or ring: what hides the epilogue

    def instructions_per_logit(self) -> float:
        """Of the epilogue, all threads together."""
        return sum(self.code.parts.epilogue.values()) * 32 * self.num_warps / (self.n * self.v)

    def tensor_clocks(self) -> float:
        """Of a step."""
        return 2 * self.n * self.v * self.d / TENSOR_FLOP_A_CLOCK

    def step_clocks(self) -> float:
        """Of a step, if L2 and memory keep up."""
        # 64 rows of an operand, those of W for few rows of H, take all of the other.
        m, n = (self.v, self.n) if self.overlap == "ring" else (self.n, self.v)
        operands = ceil(m / 64) * (64 + n) + self.n + self.v
        return max(self.tensor_clocks(), operands * self.d * 2 / SHARED_BYTES_A_CLOCK)

    def busy(self) -> dict[str, float]:
        """Clocks that the epilogue takes of each pipe, and to issue it."""
        epilogue = self.code.parts.epilogue
        busy = {"issue": sum(epilogue.values()) * self.num_warps / SCHEDULERS}
        for pipe, (rate, names) in PIPES.items():
            busy[pipe] = sass.count(epilogue, *names) * self.num_warps * 32 / rate
        return busy

    def epilogue_clocks(self, guess: Judgement) -> float:
        """Of a tile, alone on its multiprocessor."""
        return max(self.busy().values()) * (1 + guess.stall * SCHEDULERS / self.num_warps)

    def start_clocks(self, guess: Judgement) -> float:
        """From the end of an epilogue to the first tensor instruction of the next tile."""
        parts = self.code.parts
        clocks = 2.0 * sum(parts.prologue.values())
        if not parts.is_flat:
            clocks += TMA_LATENCY + self.stage_bytes / L2_BYTES_A_CLOCK
        return clocks * guess.start

    def exposed_clocks(self, steps: int, guess: Judgement, card: Card = CARDS[0]) -> float:
        """Of a tile beyond its main loop."""
        epilogue = self.epilogue_clocks(guess)
        if self.overlap == "ping-pong":
            return guess.turn + max(0.0, epilogue - steps * self.step_clocks())
        if self.overlap == "ring":
            supply = card.copy / MULTIPROCESSORS / CLOCK
            return max(0.0, epilogue - self.shared_bytes / supply)
        return epilogue + self.start_clocks(guess)

    def milliseconds(
        self, N: int, V: int, D: int, written: int, guess: Judgement, card: Card
    ) -> dict[str, float]:
        """Of a pass over N rows, by cause; `written` bytes leave it."""
        steps, tiles = ceil(D / self.d), ceil(N / self.n) * ceil(V / self.v)
        rounds = ceil(tiles / MULTIPROCESSORS)
        floor = 2e3 * N * V * D / card.gemm
        # A tile may be larger than what is left of the matrix, and the last round partial.
        tensor = rounds * MULTIPROCESSORS * steps * 2e3 * self.n * self.v * self.d / card.gemm
        shared = 1e3 * rounds * steps * self.step_clocks() / CLOCK
        l2 = 1e3 * tiles * steps * self.stage_bytes / guess.l2
        memory = 1e3 * (V * D * 2 * ceil(N / self.group_rows) + N * D * 2 + written) / card.copy
        exposed = 1e3 * rounds * self.exposed_clocks(steps, guess, card) / CLOCK
        compute = max(tensor * guess.main, shared)
        inside = max(compute, l2)
        if memory + guess.drain * exposed > inside + exposed:
            return {"stream": memory, "tile ends": guess.drain * exposed}
        parts = {"GEMM": floor, "main loop": compute - floor, "tile ends": exposed}
        return parts | {"L2": inside - compute}


def library_gemm(sizes: dict, num_bytes: int, guess: Judgement, card: Card) -> float:
    """Milliseconds of an m x n x k GEMM."""
    m, n, k = sizes["m"], sizes["n"], sizes["k"]
    waves = ceil(m / 128) * ceil(n / 256) / MULTIPROCESSORS
    # Below one wave it splits k.
    tail = guess.tail * (ceil(waves) / waves - 1) if waves > 1 else 0.0
    compute = 2e3 * m * n * k / card.gemm * (1 + tail)
    excess = m * n * (sizes["itemsize"] * (1 + sizes["accumulates"]) - 2)
    compute += 1e3 * guess.writing * excess / card.copy
    return max(compute, 1e3 * num_bytes / card.copy / guess.streaming)


def classes(counter: Counter[str], most: int = 8) -> str:
    """The most frequent instructions, without their modifiers."""
    short: Counter[str] = Counter()
    for name, number in counter.items():
        short[name if name.startswith("MUFU") else name.split(".")[0]] += number
    return ", ".join(f"{number} {name}" for name, number in short.most_common(most))


def total(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Sum by cause."""
    found: Counter[str] = Counter()
    for part in parts:
        found.update(part)
    return dict(found)
