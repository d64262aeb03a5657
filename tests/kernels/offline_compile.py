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


def matrices(tile, keep):
    """Types of the matrices of a GEMM kernel; one that is not passed is a constant None."""
    shapes = {
        "hidden": ("bf16", tile.n, tile.d),
        "weight": ("bf16", tile.v, tile.d),
        "kept": ("i16", tile.n, tile.v),
        "out": ("bf16", tile.n, tile.v),
    }
    if not keep:
        shapes.pop("kept")
    if not tile.uses_tma:
        return {name: f"*{dtype}" for name, (dtype, *_) in shapes.items()}
    return {name: f"tensordesc<{dtype}[{n},{d}]>" for name, (dtype, n, d) in shapes.items()}


def compile_kernel(arch, name, kernel, constants, types, **options):
    constants = {**{key: None for key in ("kept",) if key not in types}, **constants}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + POINTERS.get(argument, "fp32")
        else:
            signature[argument] = types.get(argument, "i32")
        # What the launcher finds out about aligned memory and sizes of real models.
        if signature[argument].startswith("*") or argument == "D" or argument.startswith("stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {key: value for key, value in constants.items() if key in signature}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report).groups()
    result = {
        "name": name,
        "registers": int(registers),
        "spilled_bytes": int(stack) + int(local),
        "shared_bytes": compiled.metadata.shared,
    }
    for instruction in ("wgmma.mma_async", "tcgen05.mma", "cp.async.bulk.tensor"):
        result[instruction] = compiled.asm["ptx"].count(instruction)
    print(json.dumps(result), flush=True)


def main(arch):
    for (kind, addressing), tile in _fused.TILES.items():
        if tile.uses_tma and arch < 90:
            continue
        blocks = dict(
            SOFTCAP=0.0, BLOCK_N=tile.n, BLOCK_V=tile.v, BLOCK_D=tile.d, TMA=tile.uses_tma
        )
        options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
        name = f"gemm {kind} {addressing}"
        for keep in (False, True):
            kernel, constants = _head_kernels.statistics_kernel, dict(blocks, KEEP=keep)
            types = matrices(tile, keep)
            compile_kernel(arch, f"{name} statistics {keep=}", kernel, constants, types, **options)
        if kind == "many":
            kernel = _head_kernels.dlogits_kernel
            compile_kernel(
                arch, f"{name} dlogits", kernel, blocks, matrices(tile, False), **options
            )
    rows = [
        (_head_kernels.anchor_kernel, dict(SOFTCAP=0.0, BLOCK_D=_fused.VECTOR_BLOCK), 4),
        (_head_kernels.reduce_kernel, dict(BLOCK=_fused.VECTOR_BLOCK), 4),
        (
            _head_kernels.unpack_kernel,
            dict(SOFTCAP=0.0, BLOCK_V=_fused.UNPACK_BLOCK),
            _fused.UNPACK_WARPS,
        ),
        *(
            (kernel, dict(SOFTCAP=0.0, BLOCK_V=_row_kernels.BLOCK_V), _row_kernels.NUM_WARPS)
            for kernel in (_row_kernels._row_statistics_kernel, _row_kernels._row_dlogits_kernel)
        ),
        (_row_kernels._scale_kernel, dict(BLOCK=_row_kernels.BLOCK_V), _row_kernels.NUM_WARPS),
    ]
    for kernel, constants, num_warps in rows:
        compile_kernel(arch, kernel.__name__, kernel, constants, {}, num_warps=num_warps)


if __name__ == "__main__":
    main(int(sys.argv[1]))
