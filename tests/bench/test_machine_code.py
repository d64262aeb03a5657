"""What CI's Triton makes of the kernels stays within its budget; the counting and the arithmetic.

The budgets hold for Triton 3.8 and 3.9. A kernel that became better lowers its budget here.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

import laser_kernels
from bench import cost, predictions, sass
from bench.cost import CARDS, CENTRAL, Kernel
from bench.offline import Device
from bench.provenance import ROOT
from bench.targets import TARGETS

# By the op that launches the kernel: registers, and instructions of a warp's epilogue.
BUDGETS = {
    "scoring": (190, 845),
    "loss": (255, 1345),
    "any_gradient": (255, 1240),
    "score": (130, 520),
    "last_token_both": (135, 785),
}


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Kernels and predictions, of a process in which Triton is not interpreted."""
    folder = tmp_path_factory.mktemp("machine_code")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    package = os.path.dirname(laser_kernels.__path__[0])
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), package, env.get("PYTHONPATH", "")])
    env["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-m", "bench.machine_code", "--smoke", "--json", folder / "out.json"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    return json.loads((folder / "out.json").read_text())["rows"]


@pytest.mark.parametrize("op", BUDGETS)
def test_budget(rows, op):
    kernel = next(row for row in rows if row.get("used_by") == op)
    print(kernel)
    registers, epilogue = BUDGETS[op]
    assert kernel["spilled_bytes"] == 0 and kernel["registers"] <= registers, kernel
    # Four products of 16 along D, one group of which runs while the next is issued; H and W.
    assert kernel["tensor_a_step"] == 4 and kernel["in_flight"] == 1, kernel
    assert kernel["loads_a_step"] == 2 and kernel["step"] <= 115, kernel
    assert kernel["prologue"] <= 100, kernel
    assert epilogue * 0.85 <= kernel["epilogue"] <= epilogue, kernel
    assert kernel["shared_bytes"] <= 227 * 1024


def test_predictions_cover_every_target_of_speed(rows):
    found = [row for row in rows if "predicted" in row]
    limits = {target.name: target.limit for target in TARGETS}
    assert len(found) == len(predictions.PREDICTIONS) * len(CARDS)
    assert {row["target"] for row in found} <= limits.keys()
    for row in found:
        assert row["impl"] == "triton" and 0.9 < row["lowest"] <= row["predicted"], row
        assert row["predicted"] <= row["highest"] < 4, row
        assert row["target_ratio"] == limits.get(row["target"], row["target_ratio"]), row
        assert row["met"] == (row["ms"] / row["bound_ms"] <= row["target_ratio"] + 1e-9), row
        assert sum(row["by_cause_ms"].values()) == pytest.approx(row["ms"], abs=0.01)


def test_committed_predictions_are_of_triton_3_6_and_complete():
    result = json.loads((ROOT / "bench/results/predicted_sm90.json").read_text())
    assert "triton 3.6." in result["header"]["versions"] and result["header"]["nvcc"]
    found = [row for row in result["rows"] if "predicted" in row]
    keys = {(row["target"], row["card"], row["impl"]) for row in found}
    names = {prediction.target for prediction in predictions.PREDICTIONS}
    cards = {card.name for card in CARDS}
    assert keys == {(n, c, i) for n in names for c in cards for i in ("triton", "cuda")}
    assert len(found) == len(keys)


# --------------------------------------------------------------------------- counting instructions

STEP = "BAR.SYNC 0x0; HGMMA.64x256x16.F32.BF16 R24; WARPGROUP.DEPBAR.LE gsb0, 0x1; @UP0 UTMALDG.2D"
EPILOGUE = "WARPGROUP.DEPBAR.LE gsb0, 0x0; MUFU.EX2 R1, R1; FADD R1, R2, R1; STG.E [R2], R1"


def listing(lines):
    """As the disassembler prints them, with labels resolved to addresses."""
    labels, code = {}, []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = f"0x{16 * len(code):04x}"
        else:
            code += [part.strip() for part in line.split(";")]
    for i, line in enumerate(code):
        *start, last = line.split()
        code[i] = " ".join([*start, labels.get(last, last)])
    return "\n".join(
        f"        /*{16 * i:04x}*/    {line} ;  /* 0x0 */" for i, line in enumerate(code)
    )


NESTED = listing(
    ["LDC R1, c[0x0]", "tiles:", "IADD3 R3, R3, R4; UTMALDG.2D [UR4]", "@P0 BRA skipped"]
    + ["steps:", STEP, "@!P0 BRA wait", "resume:", "@P1 BRA steps", EPILOGUE]
    + ["skipped:", "@P2 BRA tiles", "EXIT", "wait:", "@!P3 BRA wait", "BRA resume"]
)
FLAT = listing(
    ["LDC R1, c[0x0]; UTMALDG.2D [UR4]", "steps:", "@P0 BRA old", "IADD3 R3, R3, R4", "old:", STEP]
    + ["@P1 BRA next", EPILOGUE, "next:", "@P2 BRA steps", "EXIT"]
)


@pytest.mark.parametrize("text", [NESTED, FLAT], ids=["nested", "flat"])
def test_parts_of_a_loop(text):
    parts = sass.Code(0, 0, text).parts
    assert parts.is_flat == (text is FLAT) and parts.in_flight == 1
    short = Counter(name.split(".")[0] for name in parts.epilogue.elements())
    assert {"MUFU": 1, "FADD": 1, "STG": 1}.items() <= short.items()
    assert sum(parts.epilogue.values()) == 4
    assert sass.count(parts.step, *sass.TENSOR) == sass.count(parts.step, sass.TMA_LOAD) == 1
    assert parts.prologue["IADD3"] == 1 and not sass.count(parts.prologue, "LDC", "MUFU", "HGMMA")


def test_without_a_loop_of_tensor_instructions_there_are_no_parts():
    with pytest.raises(ValueError, match="tensor instructions"):
        _ = sass.Code(0, 0, listing(["FADD R1, R1, R1", "EXIT"])).parts


# ------------------------------------------------------------------------- what is launched


def test_operators_are_counted_by_their_bytes():
    with Device(90) as device:
        a, b, c = (device.empty(*shape) for shape in ((4, 8), (8, 16), (16,)))
        assert a.is_cuda and torch.cuda.get_device_capability(a.device) == (9, 0)
        wide = torch.mm(a, b, out_dtype=torch.float32)
        torch.addmm(wide, a, b, out_dtype=torch.float32, out=wide)
        wide[:2].view(-1)  # launches nothing
        wide.mul_(2)
        wide[0].copy_(c)
        torch.zeros_like(c)
    assert not a.is_cuda
    inputs = 2 * (4 * 8 + 8 * 16)
    found = [(launch.kind, launch.name, launch.num_bytes) for launch in device.launches]
    assert found == [
        ("gemm", "mm", inputs + 4 * 64),
        ("gemm", "addmm", inputs + 8 * 64),
        ("pointwise", "mul_", 8 * 64),
        ("pointwise", "copy_", 2 * 16 + 4 * 16),
        ("pointwise", "zeros_like", 2 * 16),
    ]
    shapes = [(x.arguments["m"], x.arguments["n"], x.arguments["k"]) for x in device.launches[:2]]
    assert shapes == [(4, 16, 8)] * 2


# -------------------------------------------------------------------------------- the arithmetic


def kernel(**changes):
    epilogue = {"MUFU.EX2": 128, "FFMA": 254, "FADD": 134, "FMNMX": 130, "FSEL": 128}
    epilogue |= {"ISETP": 67, "LOP3": 66, "SHFL": 78}
    parts = sass.Parts(Counter(HGMMA=4), Counter(epilogue), Counter(MOV=323), False, 1)
    code = sass.Code(189, 0, "")
    code.__dict__["parts"] = parts  # in place of what the text would give
    fields = dict(label="", code=code, n=128, v=256, d=64, num_warps=8, stage_bytes=48 * 1024)
    fields |= dict(shared_bytes=147480, group_rows=2048)
    return Kernel(**fields | changes)


def test_clocks_of_a_tile():
    """A kernel that was reckoned by hand: D 3584, 985 instructions a warp in the epilogue."""
    assert kernel().step_clocks() == 1024 and 56 * kernel().step_clocks() == 57344
    busy = kernel().busy()
    assert (busy["exp2"], busy["ALU"], busy["issue"]) == (2048, 1564, 1970)
    assert kernel().instructions_per_logit() == pytest.approx(985 / 128)
    assert 2300 <= kernel().epilogue_clocks(CENTRAL) <= 2800
    assert 1800 <= kernel().start_clocks(CENTRAL) <= 2200
    assert 4100 <= kernel().exposed_clocks(56, CENTRAL) <= 5000
    # Two warp groups hide it, but for the change of turns.
    assert kernel(overlap="ping-pong").exposed_clocks(56, CENTRAL) == CENTRAL.turn


def test_time_of_a_pass():
    h200 = CARDS[0]
    parts = kernel().milliseconds(8192, 152064, 3584, 0, CENTRAL, h200)
    assert parts["GEMM"] == pytest.approx(11.33, abs=0.01)
    # 288 tiles a multiprocessor, and 104.6 GB from L2.
    assert parts["tile ends"] == pytest.approx(288 * kernel().exposed_clocks(56, CENTRAL) / 1.83e6)
    in_loop = parts["GEMM"] + parts["main loop"] + parts["L2"]
    assert in_loop == pytest.approx(104.6e9 / CENTRAL.l2 * 1e3, rel=1e-3)
    # Few rows take as long as W.
    few = kernel(n=64, v=128, stage_bytes=24 * 1024, group_rows=1024)
    parts = few.milliseconds(64, 152064, 3584, 0, CENTRAL, h200)
    assert parts["stream"] == pytest.approx(1.09e9 / 4.3e12 * 1e3, rel=0.01)


def test_time_of_a_library_gemm():
    h200 = CARDS[0]
    sizes = dict(m=152064, n=3584, k=8192, itemsize=2, accumulates=False)
    rounded = cost.library_gemm(sizes, 6 * 10**9, CENTRAL, h200)
    assert rounded == pytest.approx(11.33, abs=0.02)
    wide = cost.library_gemm(sizes | {"itemsize": 4}, 7 * 10**9, CENTRAL, h200)
    assert wide - rounded == pytest.approx(CENTRAL.writing * 1.09e9 / 4.3e12 * 1e3, rel=0.01)
    few = dict(m=64, n=3584, k=152064, itemsize=4, accumulates=False)
    stream = 1e3 * 1.11e9 / 4.3e12 / CENTRAL.streaming
    assert cost.library_gemm(few, 1110 * 10**6, CENTRAL, h200) == pytest.approx(stream)
