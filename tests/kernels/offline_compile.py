"""Compile every Triton kernel at every shipped tile size for one architecture, without a GPU.

`python offline_compile.py 90` prints one JSON line a kernel. A script of its own, because in the
test process the kernels are interpreted.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from laser_kernels import _fused, _head_kernels, _row_kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    "hidden_ptr": "bf16",
    "weight_ptr": "bf16",
    "out_ptr": "bf16",
    "dlogits_ptr": "bf16",
    "grad_ptr": "bf16",
    "kept_ptr": "i16",
    "labels_ptr": "i64",
    "flags_ptr": "i32",
    "overflow_ptr": "i32",
}


def matrices(tile):
    """Types of the matrices of a GEMM kernel."""
    shapes = {
        "hidden": ("bf16", tile.n, tile.d),
        "weight": ("bf16", tile.v, tile.d),
        "kept": ("i16", tile.n, tile.v),
        "out": ("bf16", tile.n, tile.v),
    }
    if not tile.uses_tma:
        return {name: f"*{dtype}" for name, (dtype, *_) in shapes.items()}
    return {name: f"tensordesc<{dtype}[{n},{d}]>" for name, (dtype, n, d) in shapes.items()}


def compile_kernel(arch, name, kernel, constants, types=None, **options):
    """Compile and report; `constants` are the constexprs, and None for what is not passed."""
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + POINTERS.get(argument, "fp32")
        else:
            signature[argument] = (types or {}).get(argument, "i32")
        # What the launcher finds out about aligned memory and the hidden size of real models. V and
        # strides stay unknown, as they are with a vocabulary of 151937.
        if signature[argument].startswith("*") or argument == "D":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options["enable_fp_fusion"] = True
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report).groups()
    ptx = compiled.asm["ptx"]
    result = {
        "name": name,
        "registers": int(registers),
        "spilled_bytes": int(stack) + int(local),
        "shared_bytes": compiled.metadata.shared,
        "load_bytes": widest_access(ptx, "ld"),
        "store_bytes": widest_access(ptx, "st"),
    }
    for instruction in ("wgmma.mma_async", "tcgen05.mma", "cp.async.bulk.tensor"):
        result[instruction] = ptx.count(instruction)
    print(json.dumps(result), flush=True)


def widest_access(ptx, operation):
    """Bytes of a thread's widest access to global memory, such as ld.global.v4.b32."""
    accesses = re.findall(rf"\b{operation}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in accesses), default=0)


def compile_tiles(arch, kind, addressing, tile):
    """What `Fused` launches: a first pass over all rows, and another over those flagged."""

    def compile_gemm(name, kernel, softcap, **constants):
        keeps = constants.get("kept", "wanted") is not None
        compile_kernel(
            arch,
            f"gemm {kind} {addressing} {name} softcap={softcap:g}",
            kernel,
            dict(
                SOFTCAP=softcap,
                BLOCK_N=tile.n,
                BLOCK_V=tile.v,
                BLOCK_D=tile.d,
                TMA=tile.uses_tma,
                FLATTEN=tile.uses_tma and arch == 90,
                **constants,
            ),
            matrices(tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages if keeps else tile.score_stages,
        )

    kernel, is_few = _head_kernels.statistics_kernel, kind == "few"
    first, again = dict(flags_ptr=None, MAXIMUM=is_few), dict(MAXIMUM=True)
    keep, score = dict(ENTROPY=False), dict(ENTROPY=False, kept=None)
    entropy = dict(ENTROPY=True, kept=None)
    compile_gemm("keep", kernel, 0.0, **keep, **first)
    compile_gemm("keep", kernel, 30.0, **keep, **first)
    compile_gemm("keep again", kernel, 0.0, **keep, **again)
    compile_gemm("score", kernel, 0.0, **score, **first)
    if is_few:
        compile_gemm("score again", kernel, 0.0, **score, **again)
        return
    compile_gemm("entropy", kernel, 0.0, **entropy, **first)
    compile_gemm("entropy", kernel, 30.0, **entropy, **first)
    compile_gemm("entropy again", kernel, 0.0, **entropy, **again)
    for softcap in (0.0, 30.0):
        compile_gemm("dlogits", _head_kernels.dlogits_kernel, softcap, slope_ptr=None)
        compile_gemm("dlogits with slope", _head_kernels.dlogits_kernel, softcap)


def main(arch):
    for (kind, addressing), tile in _fused.TILES.items():
        if tile.uses_tma and arch < 90:
            continue
        compile_tiles(arch, kind, addressing, tile)
        if kind == "many":
            compile_kernel(
                arch,
                f"anchor {addressing}",
                _head_kernels.anchor_kernel,
                dict(SOFTCAP=0.0, BLOCK_N=_fused.ANCHOR_ROWS, BLOCK_D=tile.d),
                num_warps=_fused.ANCHOR_WARPS,
                num_stages=_fused.ANCHOR_STAGES,
            )
    kernel, constants = _head_kernels.reduce_kernel, dict(BLOCK=_fused.VECTOR_BLOCK)
    first = dict(flags_ptr=None, entropy_ptr=None, MAXIMUM=False)
    compile_kernel(arch, "reduce", kernel, dict(constants, **first))
    compile_kernel(arch, "reduce again", kernel, dict(constants, MAXIMUM=True))
    for softcap in (0.0, 30.0):
        row = dict(SOFTCAP=softcap, ALIGN=8)
        unpack = dict(row, BLOCK_V=_fused.UNPACK_BLOCK)
        name, warps = f"unpack softcap={softcap:g}", _fused.UNPACK_WARPS
        compile_kernel(arch, name, _head_kernels.unpack_kernel, unpack, num_warps=warps)
        row["BLOCK_V"] = _row_kernels.BLOCK_V
        for name, kernel, constants in (
            ("statistics", _row_kernels._row_statistics_kernel, row),
            ("dlogits", _row_kernels._row_dlogits_kernel, dict(row, slope_ptr=None)),
        ):
            name, warps = f"row {name} softcap={softcap:g}", _row_kernels.NUM_WARPS
            compile_kernel(arch, name, kernel, constants, num_warps=warps)


if __name__ == "__main__":
    main(int(sys.argv[1]))
