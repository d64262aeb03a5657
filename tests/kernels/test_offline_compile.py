"""Every kernel, in every configuration that an op launches, compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import laser_kernels

ROOT = Path(__file__).resolve().parents[2]
KB = 1024
MAX_SHARED = {80: 163 * KB, 90: 227 * KB, 100: 227 * KB}
# Tiles by pointer also serve devices such as sm_86, sm_89 and sm_120.
MAX_SHARED_BY_POINTER = 99 * KB
# Two registers, where the logits are kept on sm_100: with a softcap, or with Triton 3.8.
MAX_SPILLED_BYTES = {100: 8}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_within_the_limits_of_the_device(arch, tmp_path):
    # The kernels are interpreted in this process.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    package = Path(laser_kernels.__path__[0]).parent
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(package), env.get("PYTHONPATH", "")])
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "bench.compiled", str(arch)]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    gemms = [kernel for kernel in kernels if kernel["is_gemm"]]
    users = {(kernel["used_by"], "tma" in kernel["name"]) for kernel in gemms}
    ops = {"scoring", "loss", "any_gradient", "score", "last_token_both"}
    assert users >= {(op, by_tma) for op in ops for by_tma in {False, arch > 80}}
    small = {kernel["name"].split()[0].rstrip(",") for kernel in kernels} - {"dlogits"}
    assert small >= {"anchor", "reduce", "unpack", "row_statistics", "row_dlogits"}
    for kernel in kernels:
        allowed = MAX_SPILLED_BYTES.get(arch, 0) if "kept" in kernel["name"] else 0
        assert kernel["spilled_bytes"] <= allowed, kernel
        by_pointer = kernel["is_gemm"] and "tma" not in kernel["name"]
        limit = MAX_SHARED_BY_POINTER if by_pointer else MAX_SHARED[arch]
        assert kernel["shared_bytes"] <= limit, kernel
    for kernel in kernels:
        # 16 bytes a thread, at odd V as well.
        if kernel["name"].startswith(("unpack", "row_")):
            assert kernel["load_bytes"] == 16, kernel
            assert kernel["store_bytes"] == (4 if "statistics" in kernel["name"] else 16), kernel
    for kernel in gemms:
        instruction = {80: None, 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
        assert instruction is None or kernel[instruction] > 0, kernel
        assert (kernel["cp.async.bulk.tensor"] > 0) == ("tma" in kernel["name"]), kernel
