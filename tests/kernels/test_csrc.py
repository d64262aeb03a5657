"""The CUDA C++ kernels without a GPU: an emulated Hopper runs every thread of their device code.

The reference is float64 on the same inputs. `emulation/hopper.cuh` says what the emulation can and
cannot show; that nvcc compiles the kernels, without spills, is tested beside bench/csrc.py.
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils import cpp_extension

from laser_kernels import _dispatch, _extension
from laser_kernels._maths import Head, row_gradient

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).parent / "emulation"
STEPS = 512  # a kept logit counts steps of 2^-9
DTYPES = [torch.bfloat16, torch.float16]
# N, D, V. The emulated GPU has four multiprocessors, so that most CTAs take several tiles.
MANY = [
    (1, 8, 97),  # one row, one step of an eighth, half a tile
    (5, 64, 192),  # exactly one tile and one step
    (129, 136, 1000),  # a single row for the second CTA; a ragged step and tile
    (300, 520, 400),  # two tiles of rows; more steps than stages
]
FEW = [
    (1, 8, 97),
    (16, 72, 1300),
    (33, 520, 600),  # more steps than stages
    (128, 136, 2600),  # all of the batch dimension, three tiles a CTA
]
CASES = [("many", *sizes) for sizes in MANY] + [("few", *sizes) for sizes in FEW]

emulates = pytest.mark.skipif(
    shutil.which("g++") is None or torch.cuda.is_available(),
    reason="needs g++ and Triton's interpreter, which runs the small kernels around",
)


class Emulated(NamedTuple):
    fused: _extension.Cuda
    library: Path

    def shared_bytes(self) -> int:
        return ctypes.CDLL(str(self.library)).shared_bytes_of_last_launch()


def build(folder: Path, name: str, sources=_extension.SOURCES, change=None) -> Emulated:
    """Compile copies of the sources beside the emulated header, one of them changed."""
    for path in (*(ROOT / "csrc").iterdir(), *EMULATION.iterdir()):
        shutil.copy(path, folder)
    if change is not None:
        file, old, new = change
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
        (folder / file).write_text(text.replace(old, new))
    torch_folder = Path(torch.__file__).parent
    library = folder / f"{name}.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-O1" if change else "-O3", f"-DLIBRARY={name}"]
    # Lets the dot products of the emulated tensor cores use vector instructions.
    command += ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
    command += ["-isystem", torch_folder / "include", f"-L{torch_folder / 'lib'}"]
    command += ["-x", "c++", *sources, "-o", library, "-ltorch_cpu"]
    run = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    torch.ops.load_library(library)
    return Emulated(_extension.Cuda(getattr(torch.ops, name)), library)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Emulated:
    return build(tmp_path_factory.mktemp("emulated"), "laser_kernels_emulated")


@pytest.fixture
def fused(emulated) -> _extension.Cuda:
    return emulated.fused


def exact_rows(head, inv_temperature):
    """Log-probs [N, V], logsumexp and entropy in float64."""
    logits = (
        head.hidden_states.double() @ head.weight.double().T * inv_temperature.double()[:, None]
    )
    logprobs = torch.log_softmax(logits, 1)
    return logprobs, logits.logsumexp(1), -(logprobs.exp() * logprobs).sum(1)


def check_scores(fused, head, kind):
    """Statistics and kept logits of a head against float64, in one run that keeps and one not."""
    h, w, labels = (x.detach() for x in head)
    inv_temperature = torch.rand(len(h)) / 2 + 0.75
    logprobs, *others = exact_rows(head, inv_temperature)
    head, few = Head(h, w, labels, inv_temperature), kind == "few"
    stats, kept, offset = fused.keep(head, few)
    expected = (logprobs.gather(1, labels[:, None])[:, 0], *others)
    for actual, exact in zip(stats, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-7, atol=2e-5)
    # Kept logits below the range stick to its end, e^-44.
    exact = (logprobs + offset.double()[:, None]) / torch.log(torch.tensor(2.0)).double()
    error = kept.double() / STEPS - exact.clamp(min=-64)
    assert error.abs().max() <= 0.5 / STEPS + 2e-4
    # After the numbers, so that one run finds what is wrong.
    assert all(map(torch.equal, stats, fused.statistics(head, few=few)))
    return kept, offset


@emulates
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "num_rows", "hidden_size", "vocabulary"), CASES)
def test_scores(fused, make_head, kind, num_rows, hidden_size, vocabulary, dtype):
    check_scores(fused, make_head(num_rows, hidden_size, vocabulary, dtype), kind)


@emulates
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "hidden_size", "vocabulary"), MANY)
def test_dlogits(fused, make_head, relative_error, num_rows, hidden_size, vocabulary, dtype):
    head = make_head(num_rows, hidden_size, vocabulary, dtype)
    h, w, labels = (x.detach() for x in head)
    inv_temperature = torch.rand(num_rows) / 2 + 0.75
    logprobs, logsumexp, entropy = exact_rows(head, inv_temperature)
    expected_target = logprobs.gather(1, labels[:, None])[:, 0]
    g, e = torch.randn(num_rows), torch.randn(num_rows)
    gradient = row_gradient(expected_target.float(), inv_temperature, g, entropy.float(), e)
    if num_rows > 1:
        labels[-1] = -1  # the target is in another shard
    head = Head(h, w, labels, inv_temperature)
    actual = fused.recompute_dlogits(head, logsumexp.float(), gradient)
    constant, slope, target = (x.double() for x in gradient)
    expected = logprobs.exp() * (constant[:, None] + slope[:, None] * logprobs)
    here = labels >= 0
    expected[here, labels[here]] = target[here]
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert relative_error(actual, expected) <= {torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    if num_rows > 5:
        _, kept, offset = fused.keep(head._replace(labels=labels.clamp(min=0)))
        gradient = row_gradient(expected_target.float(), inv_temperature, g)
        constant, _, target = gradient
        actual = fused.dlogits_from_kept(kept, offset, head, gradient)
        expected = logprobs.exp() * constant.double()[:, None]
        expected[here, labels[here]] = target.double()[here]
        # The interpreter truncates to bfloat16.
        assert relative_error(actual, expected) <= 6e-3


@emulates
@pytest.mark.parametrize("kind", ["many", "few"])
def test_far_targets_are_done_again_around_the_maximum(fused, make_head, push_away, kind):
    """Targets of probability e^-45 to e^-1000: the second run, by flags on the device."""
    head = make_head(128, 64, 500, torch.bfloat16, max_logit=3)
    push_away(head, {0: 45, 77: 120, 127: 1000})
    check_scores(fused, head, kind)


@emulates
@pytest.mark.parametrize("kind", ["many", "few"])
def test_flags_choose_the_rows(fused, kind):
    """No flag: nothing is written. One flag: its tile of 256 rows, or the batch, and no other."""
    num_rows = 300 if kind == "many" else 20
    h, w = torch.randn(num_rows, 8).half(), torch.randn(100, 8).half()
    ones = torch.ones(num_rows)
    head, few = Head(h, w, torch.zeros(num_rows, dtype=int), ones), kind == "few"
    for flagged in (None, num_rows - 1):
        flags = torch.zeros(num_rows + 1, dtype=torch.int32)
        if flagged is not None:
            flags[flagged], flags[-1] = 1, 1
        partials = torch.full((num_rows, 3, 1), torch.nan)
        kept = torch.full((num_rows, 104), 12345, dtype=torch.int16)
        fused.launch_statistics(head, kept[:, :100], flags, ones, partials, few)
        first = num_rows if flagged is None else 256 if kind == "many" else 0
        assert partials[:first].isnan().all() and partials[first:].isfinite().all()
        assert (kept[:first] == 12345).all() and (kept[first:, :100] != 12345).all()
        assert (kept[:, 100:] == 12345).all()  # the padding is nobody's


@emulates
@pytest.mark.parametrize(("kind", "num_rows"), [("many", 300), ("few", 60)])
def test_any_order_of_threads_gives_the_same_bits(fused, make_head, kind, num_rows):
    """Every launch schedules threads and transfers differently."""
    h, w, labels = (x.detach() for x in make_head(num_rows, 200, 1000, torch.bfloat16))
    head = Head(h, w, labels, torch.ones(num_rows))
    runs = [fused.keep(head, few=kind == "few") for _ in range(2)]
    for a, b in zip((*runs[0][0], *runs[0][1:]), (*runs[1][0], *runs[1][1:]), strict=True):
        assert torch.equal(a, b)
    if kind == "many":
        alone = fused.keep(head.rows(slice(200, 201)))
        assert torch.equal(alone[0].logprobs, runs[0][0].logprobs[200:201])


@emulates
def test_shared_memory_of_every_kernel(emulated):
    """At most the 227 KB of a CTA, and nearly all of it: a longer ring hides more latency."""
    found = {}
    w, kept = torch.randn(64, 8).half(), torch.empty(128, 64, dtype=torch.int16)
    for kind, num_rows in (("many", 1), ("few", 16), ("few", 64), ("few", 128)):
        h, rows = torch.randn(num_rows, 8).half(), torch.ones(num_rows)
        head = Head(h, w, torch.zeros(num_rows, dtype=int), rows)
        flags = torch.full((num_rows + 1,), 2, dtype=torch.int32)
        for out in (None, kept[:num_rows]):
            partials = torch.empty(num_rows, 3, 1)
            emulated.fused.launch_statistics(head, out, flags, rows, partials, kind == "few")
            name = f"{kind} rows, N {num_rows}, {'kept' if out is not None else 'none'}"
            found[name] = emulated.shared_bytes() / 1024
    print(found)
    assert all(180 < kilobytes <= 227 for kilobytes in found.values()), found


# One error each, and what it breaks. Compiled as a copy, and run on the ragged shapes.
ERRORS = {
    "phase of the full barriers": ("common.cuh", "use / STAGES & 1);", "(use / STAGES & 1) ^ 1);"),
    "swizzle of what is stored": ("common.cuh", "offset ^ (offset >> 3 & 0x70)", "offset"),
    "stride between groups of rows": ("common.cuh", "1024 >> 4", "512 >> 4"),
    "no turns": ("linear_logprob.cu", "barrier_wait(turn, done & 1);", ""),
    "turns taken by single warps": (
        "linear_logprob.cu",
        "named_barrier(1 + consumer, WARP_GROUP);\n      barrier_wait(turn",
        "barrier_wait(turn",
    ),
    "stage released too early": ("linear_logprob.cu", "wgmma_wait<1>();", ""),
    "stage released by one CTA": ("linear_logprob.cu", "ring.init(CLUSTER * 4)", "ring.init(4)"),
    "accumulators of the other half": (
        "linear_logprob.cu",
        "const float* z = acc + 4 * j + 2 * half;\n      const float x0",
        "const float* z = acc + 4 * j + 2 - 2 * half;\n      const float x0",
    ),
    "one column too many": ("linear_logprob.cu", "offset < num_columns", "offset <= num_columns"),
    "buffer overwritten while it is stored": (
        "linear_logprob.cu",
        "if (is_first_thread) store_wait();\n          named",
        "named",
    ),
    "few: accumulators transposed": (
        "last_token.cu",
        "i / 2 * 4 + half * 2 + i % 2",
        "i / 2 * 4 + half + i % 2 * 2",
    ),
    "few: sums read before they are there": (
        "last_token.cu",
        "rows, sums + warp * BLOCK_B, B, V);\n    named_barrier(1, CONSUMER_WARPS * 32);",
        "rows, sums + warp * BLOCK_B, B, V);",
    ),
}


@emulates
@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_emulation_notices(error, make_head, tmp_path):
    file = ERRORS[error][0]
    # Three tiles a CTA, the last of them ragged, and more steps than stages.
    kind, sizes = (
        ("few", (100, 456, 2600)) if file == "last_token.cu" else ("many", (290, 392, 400))
    )
    source = "last_token.cu" if kind == "few" else "linear_logprob.cu"
    name = "broken_" + "".join(c if c.isalnum() else "_" for c in error)
    broken = build(tmp_path, name, [source], ERRORS[error]).fused
    head = make_head(*sizes, torch.bfloat16)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        check_scores(broken, head, kind)
    print(f"{error}: {str(caught.value).strip().splitlines()[0]}")


# ------------------------------------------------------------------------- building, without a GPU


@pytest.fixture
def toolkit(tmp_path):
    """A folder that looks like a CUDA toolkit."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    return str(tmp_path)


def test_loader_says_what_is_missing(monkeypatch, toolkit):
    def message() -> str:
        with pytest.raises(RuntimeError) as caught:
            _extension.load()
        text = str(caught.value)
        assert text.startswith("impl='cuda' builds a CUDA C++ extension, but ")
        assert text.endswith("; impl='triton' computes the same") and "\n" not in text
        return text

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA; install a CUDA build" in message()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert "nvcc was not found; install the CUDA 13.0 toolkit, or set CUDA_HOME" in message()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", f"{toolkit}/bin")  # a folder without nvcc
    assert "nvcc was not found" in message()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", toolkit)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    assert "ninja is missing; pip install ninja" in message()
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    log = "Error building extension 'laser_kernels_cuda': [1/3] nvcc\nx.cu(3): error: no such type"

    def fail(*_, **__):
        raise RuntimeError(log)

    monkeypatch.setattr(cpp_extension, "load", fail)
    text = message()
    assert f"{toolkit}/bin/nvcc" in text and "(x.cu(3): error: no such type)" in text


def test_loader_hands_pytorch_the_sources_and_sm_90a(monkeypatch, toolkit):
    calls = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", toolkit)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setattr(
        cpp_extension, "load", lambda *args, **options: calls.append((args, options))
    )
    _extension.load.cache_clear()
    assert _dispatch.load_backend("cuda") is _dispatch.load_backend("cuda")
    _extension.load.cache_clear()
    (((_, sources), options),) = calls
    assert [Path(source).name for source in sources] == list(_extension.SOURCES)
    assert all(Path(source).is_file() for source in sources)
    assert "-gencode=arch=compute_90a,code=sm_90a" in options["extra_cuda_cflags"]
    assert options["is_python_module"] is False


def test_sources_are_found_in_a_checkout_and_in_a_wheel(tmp_path):
    assert _extension.source_folder().resolve() == ROOT / "csrc"
    # What a wheel holds, unpacked; in a fresh process, away from the checkout.
    command = [sys.executable, "-c", "from setuptools import setup; setup()"]
    command += ["egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    code = "from laser_kernels import _extension as e; print(e.source_folder())"
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
    )
    folder = tmp_path / "lib" / "laser_kernels" / "csrc"
    assert run.stdout.strip() == str(folder), run.stderr
    names = {path.name for path in (ROOT / "csrc").iterdir()}
    assert {path.name for path in folder.iterdir()} == names
