"""Read machine code: the loop of the tensor cores, and what surrounds it once a tile.

`cuobjdump -sass` lists a kernel's instructions with their addresses. Their branches give basic
blocks, dominators and loops, and these the parts of a persistent GEMM kernel:

    step        what every iteration of the innermost loop with tensor instructions executes, and
                what it leaves to one thread: loads, on Blackwell the tensor instructions too
    epilogue    what the last wait for the accumulators dominates, within the loop over tiles
    prologue    everything else in the loop over tiles

They are the same whether the compiler keeps two loops or flattens them into one, in which the
epilogue is a branch. Counts are of one warp and static: nothing in these parts loops but waits.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Hopper's wgmma and tcgen05 of data-centre Blackwell.
TENSOR = ("HGMMA", "UTCHMMA")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)")
TMA_LOAD, TMA_STORE = "UTMALDG", "UTMASTG"


def cuobjdump(option: str, binary: Path) -> str:
    """What the disassembler says of a cubin, object file or library."""
    command = [CUOBJDUMP, option, binary]
    path = {"PATH": f"{CUOBJDUMP.parent}"}  # it calls nvdisasm
    return subprocess.run(command, capture_output=True, text=True, check=True, env=path).stdout


@dataclass(frozen=True)
class Code:
    """A kernel's resources and instructions."""

    registers: int
    spilled_bytes: int
    text: str

    @cached_property
    def parts(self) -> Parts:
        """The parts of a persistent GEMM kernel."""
        return _parts(self.text)


@dataclass(frozen=True)
class Parts:
    """Instructions by name, with their modifiers, as one warp executes them."""

    step: Counter[str]
    epilogue: Counter[str]
    prologue: Counter[str]
    is_flat: bool  # one loop over tiles and steps
    in_flight: int  # wgmma groups that a step leaves running; 0 stalls the tensor cores


def read(binary: Path) -> dict[str, Code]:
    """Every kernel of a binary by its mangled name."""
    usage = {
        name: (int(registers), int(stack) + int(local))
        for name, registers, stack, local in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)",
            cuobjdump("--dump-resource-usage", binary),
        )
    }
    sections = cuobjdump("-sass", binary).split("Function : ")[1:]
    return {name: Code(*usage[name], text) for text in sections if (name := text.split()[0])}


def count(counter: Counter[str], *names: str) -> int:
    """Instructions of these names, with any modifiers."""
    return sum(n for name, n in counter.items() if name.split(".")[0] in names)


@dataclass(frozen=True)
class _Instruction:
    address: int
    name: str
    text: str

    @property
    def target(self) -> int | None:
        """Where it may jump."""
        jumps = self.name.startswith(("BRA", "BSSY"))
        return int(self.text.split("0x")[-1], 16) if jumps else None

    @property
    def falls_through(self) -> bool:
        always = re.fullmatch(r"(BRA(\.U)? 0x\w+|EXIT|RET\S* .*)", self.text.strip())
        return not always


def _instructions(text: str) -> list[_Instruction]:
    found = []
    for address, line in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*?)\s*;", text):
        name = re.sub(r"^@\S+\s+", "", line).split()[0]
        found.append(_Instruction(int(address, 16), name, line))
    return [i for i in found if i.name != "NOP"]


def _parts(text: str) -> Parts:
    blocks, successors = _blocks(_instructions(text))
    order = sorted(blocks)
    dominators = _dominators(order, successors)
    loops = _loops(order, successors, dominators)
    matrix = [b for b in order if any(i.name.startswith(TENSOR) for i in blocks[b])]
    around = sorted((loop for loop in loops if set(matrix) & loop[1]), key=lambda x: len(x[1]))
    if not around:
        raise ValueError("expected a loop with tensor instructions, found none")
    latches, inner = around[0]
    outer = around[-1][1]
    start = _first_read(blocks, dominators, outer)
    if start is None:
        raise ValueError("expected a wait for the accumulators in the loop over tiles, found none")
    epilogue = {b for b in outer if start[0] in dominators[b]}
    is_flat = bool(epilogue & inner)
    by_one_thread = {
        b for b in inner if any(i.name.startswith((*TENSOR, TMA_LOAD)) for i in blocks[b])
    }
    step = {b for b in inner if all(b in dominators[latch] for latch in latches)}
    step = (step | by_one_thread) - epilogue
    rest = outer - epilogue - (set() if is_flat else inner) - step
    waits = [_WAIT.search(i.text) for b in step for i in blocks[b]]
    return Parts(
        _count(blocks, step),
        _count({**blocks, start[0]: blocks[start[0]][start[1] :]}, epilogue),
        _count({**blocks, start[0]: blocks[start[0]][: start[1]]}, rest | {start[0]}),
        is_flat,
        max([int(wait[1], 16) for wait in waits if wait], default=0),
    )


def _first_read(blocks, dominators, outer) -> tuple[int, int] | None:
    """Block and index of the wait after which the accumulators are final.

    On Hopper the wait for all wgmma; on Blackwell the first load from tensor memory.
    """
    for pattern in (r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", r"LDTM"):
        found = [
            (block, index)
            for block in sorted(outer)
            for index, i in enumerate(blocks[block])
            if re.search(pattern, i.text)
        ]
        # The one that comes before all others: it dominates their blocks.
        for block, index in found:
            if all(block in dominators[other] for other, _ in found):
                return block, index
    return None


def _count(blocks, chosen: Iterable[int]) -> Counter[str]:
    return Counter(i.name for block in chosen for i in blocks[block])


def _blocks(code: list[_Instruction]):
    """Basic blocks by the index of their first instruction, and the edges between them."""
    index = {i.address: n for n, i in enumerate(code)}
    targets = {n: index.get(i.target) for n, i in enumerate(code) if i.target is not None}
    ends = {n for n, i in enumerate(code) if i.name.startswith("BRA") or not i.falls_through}
    starts = sorted({0, *(t for t in targets.values() if t is not None), *(n + 1 for n in ends)})
    starts = [n for n in starts if n < len(code)]
    blocks, successors = {}, {}
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        blocks[start] = code[start:end]
        last = end - 1
        jump = [targets[last]] if last in ends and targets.get(last) is not None else []
        successors[start] = jump + ([end] if code[last].falls_through and end < len(code) else [])
    return blocks, successors


def _dominators(order, successors) -> dict[int, set[int]]:
    """Blocks through which every path from the start to a block leads."""
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for successor in successors[block]:
            before[successor].append(block)
    found = {block: set(order) for block in order}
    found[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            sets = [found[b] for b in before[block]]
            new = {block} | (set.intersection(*sets) if sets else set())
            changed |= new != found[block]
            found[block] = new
    return found


def _loops(order, successors, dominators) -> list[tuple[list[int], set[int]]]:
    """Natural loops: the blocks that jump back, and all blocks; one a header."""
    before: dict[int, set[int]] = {block: set() for block in order}
    for block in order:
        for successor in successors[block]:
            before[successor].add(block)
    back: dict[int, list[int]] = {}
    for block in order:
        for successor in successors[block]:
            if successor in dominators[block]:
                back.setdefault(successor, []).append(block)
    loops = []
    for header, latches in back.items():
        body, todo = {header}, list(latches)
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += before[block]
        loops.append((latches, body))
    return loops
