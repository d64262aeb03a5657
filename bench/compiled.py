"""The GPU kernels as compilers make them: every configuration that the ops launch.

python -m bench.compiled 90         Triton's kernels, one JSON line each
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bench import csrc, offline, sass
from bench.cost import Kernel
from bench.offline import SHAPE, Launch, launches
from bench.provenance import ROOT
from laser_kernels import _extension, _head_kernels

ROWS, FEW_ROWS = 8192, 64
CASES = (
    *((op, ROWS, {}) for op in (offline.scoring, offline.loss, offline.any_gradient)),
    *((op, FEW_ROWS, {}) for op in (offline.score, offline.last_token_both)),
)
OTHER_CASES = (
    (offline.entropy, ROWS, {}),
    *((op, rows, {"softcap": 30.0}) for op, rows, _ in CASES),
    *((op, ROWS, {"impl": "chunked"}) for op in (offline.scoring, offline.loss)),
)
# D and V of real heads, a V that is not even, and rows that TMA cannot address.
SIZES = {"": SHAPE[1:], "odd V": (3584, 50257), "unaligned": (3588, 50257)}


class Shipped(NamedTuple):
    """A kernel of Triton, the first op that launches it, and its machine code."""

    name: str
    used_by: str
    launch: Launch
    code: sass.Code


def shipped(arch: int, *, all_cases: bool = True) -> list[Shipped]:
    """Triton's kernels in every configuration, or those without options for aligned heads."""
    found: dict[str, Shipped] = {}
    for remark, (D, V) in SIZES.items() if all_cases else [("", SHAPE[1:])]:
        # Options change the same code for heads of other sizes.
        has_options = all_cases and not remark
        for op, num_rows, options in CASES + (OTHER_CASES if has_options else ()):
            for launch in launches(op, arch, num_rows, D, V, **{"impl": "triton"} | options):
                name = ", ".join(filter(None, (label(launch), remark)))
                if launch.kind == "triton" and name not in found:
                    found[name] = Shipped(name, op.__name__, launch, code_of(launch))
    return list(found.values())


def label(launch: Launch) -> str:
    """For example "statistics 128x256x64 tma kept"."""
    constants = {k: v for k, v in launch.arguments.items() if k.isupper() and len(k) > 1}
    name = launch.name.strip("_").removesuffix("_kernel")
    if is_gemm(launch):
        name += f" {constants['BLOCK_N']}x{constants['BLOCK_V']}x{constants['BLOCK_D']}"
        name += " tma" if constants["TMA"] else " pointer"
    flags = [k.lower() for k, v in constants.items() if v and k != "TMA" and "BLOCK" not in k]
    # With a matrix or vector that may be left out the kernel is another one.
    optional = ("kept", "slope_ptr", "flags_ptr", "entropy_ptr")
    flags += [k for k in optional if launch.arguments.get(k) is not None]
    return " ".join([name, *flags])


def is_gemm(launch: Launch) -> bool:
    """Whether it is one of Triton's kernels with tensor instructions over all of V."""
    return launch.kind == "triton" and "TMA" in launch.arguments


def code_of(launch: Launch) -> sass.Code:
    """Machine code of a kernel that Triton compiled."""
    return _disassembled(launch.compiled.asm["cubin"])


@cache
def _disassembled(cubin: bytes) -> sass.Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = sass.read(Path(file.name)).values()
    return code


def triton_kernel(launch: Launch, code: sass.Code, name: str = "") -> Kernel:
    """A GEMM kernel of Triton."""
    n, v, d = (launch.arguments[f"BLOCK_{axis}"] for axis in "NVD")
    return Kernel(
        name or label(launch),
        code,
        n,
        v,
        d,
        launch.arguments["num_warps"],
        (n + v) * d * 2,
        launch.compiled.metadata.shared,
        n * _head_kernels.GROUP.value,
    )


def cuda_kernels() -> dict[str, Kernel]:
    """The bfloat16 kernels of csrc/, by the names of bench/csrc.py."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in _extension.SOURCES:
            target = Path(folder, name).with_suffix(".o")
            csrc.compile_source(ROOT / "csrc" / name, target)
            for mangled, code in sass.read(target).items():
                kernel = csrc.readable(mangled)
                if " bfloat16" in kernel:
                    found[kernel] = cuda_kernel(kernel, code)
    return found


def cuda_kernel(name: str, code: sass.Code) -> Kernel:
    """A kernel of csrc/ with the constants of its source; shared memory is its ring of stages."""
    is_few = name.startswith("last_token")
    text = (ROOT / "csrc" / ("last_token.cu" if is_few else "linear_logprob.cu")).read_text()

    def constant(key: str) -> int:
        return int(re.search(rf"constexpr int {key} = (\d+)", text)[1])

    v, d, limit = constant("BLOCK_V"), 64, 227 * 1024 - 256
    if is_few:
        n = int(re.search(r" B (\d+)", name)[1])
        stage, warps = (v + n) * d * 2, 4 * constant("CONSUMERS")
        ring = (limit - warps * n * 12) // stage * stage
        return Kernel(name, code, n, v, d, warps, stage, ring, n, "ring")
    n, cluster = constant("BLOCK_N"), constant("CLUSTER")
    buffers = 0 if name.endswith("none") else constant("CONSUMERS") * 64 * v * 2
    stage = (n + v) * d * 2
    ring = (limit - buffers) // stage * stage
    # A CTA loads its share of W, and gets the other's too.
    loads, group = (n + v // cluster) * d * 2, constant("GROUP") * cluster * n
    return Kernel(name, code, n, v, d, 4, loads, ring, group, "ping-pong")


def widest_access(ptx: str, operation: str) -> int:
    """Bytes of a thread's widest access to global memory, such as ld.global.v4.b32."""
    accesses = re.findall(rf"\b{operation}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in accesses), default=0)


def main(arch: int) -> None:
    """Print what Triton makes of every kernel."""
    for name, used_by, launch, code in shipped(arch):
        ptx = launch.compiled.asm["ptx"]
        words = ("wgmma.mma_async", "tcgen05.mma", "cp.async.bulk.tensor")
        row = {
            "name": name,
            "used_by": used_by,
            "is_gemm": is_gemm(launch),
            "registers": code.registers,
            "spilled_bytes": code.spilled_bytes,
            "shared_bytes": launch.compiled.metadata.shared,
            "load_bytes": widest_access(ptx, "ld"),
            "store_bytes": widest_access(ptx, "st"),
        }
        print(json.dumps(row | {word: ptx.count(word) for word in words}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
