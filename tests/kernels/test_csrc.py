"""The CUDA C++ kernels without a GPU: an emulated Hopper runs every thread of their device code.

The reference is float64 on the same inputs. `emulation/hopper.cuh` says what the emulation can and
cannot show; that nvcc compiles the kernels, without spills, is tested beside bench/csrc.py.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from laser_kernels import _extension
from laser_kernels._maths import LN2, Head, Statistics, row_gradient

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


def tensor_core_dot(a, b):
    """<a_i, b_i> as a tensor core of Hopper forms it; see the header of the emulation."""

    def exponent(x):
        return torch.where(x == 0, -126, torch.frexp(x.float()).exponent - 1)

    total = torch.zeros(len(a))
    for start in range(0, a.shape[1], 16):
        x, y = (m[:, start : start + 16] for m in (a, b))
        highest = (exponent(x) + exponent(y)).amax(1).maximum(exponent(total))
        terms = torch.cat([x.double() * y.double(), total.double()[:, None]], 1)
        unit = torch.exp2(highest.double() - 25)[:, None]
        exact = ((terms / unit).trunc() * unit).sum(1)
        total = exact.float()
        too_large = total.abs() > exact.abs()
        total[too_large] = total[too_large].nextafter(torch.zeros(()))
    return total


class EmulatedCuda(_extension.Cuda):
    """With the anchor that a tensor core gives; Triton's interpreter has no bfloat16 tl.dot."""

    def _launch_anchor(self, head, few, target, anchor, overflowed):
        logits = tensor_core_dot(head.hidden_states, head.weight[head.labels])
        scale = head.inv_temperature / LN2
        if head.softcap:
            logits, scale = torch.tanh(logits / head.softcap), scale * head.softcap
        target.copy_(logits * scale)
        anchor.copy_(target)
        overflowed.zero_()


class Emulated(NamedTuple):
    fused: EmulatedCuda
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
    return Emulated(EmulatedCuda(getattr(torch.ops, name)), library)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Emulated:
    return build(tmp_path_factory.mktemp("emulated"), "laser_kernels_emulated")


@pytest.fixture
def fused(emulated) -> EmulatedCuda:
    return emulated.fused


def exact_logits(head):
    """Capped and tempered logits [N, V] in float64."""
    logits = head.hidden_states.double() @ head.weight.double().T
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits * head.inv_temperature.double()[:, None]


def with_temperature(head, softcap=0.0):
    h, w, labels = (x.detach() for x in head)
    return Head(h, w, labels, torch.rand(len(h)) / 2 + 0.75, softcap)


def tolerance(head):
    """What tensor cores allow: they truncate their accumulator after every 16 elements of D.

    The products of float16 have 22 bits, those of bfloat16 16, and lose more when they are aligned.
    With D from 520 to 4096 the largest error was 1.7 times what bfloat16 is allowed; its own, 1.0.
    """
    step = {torch.bfloat16: 2**-25, torch.float16: 2**-24}[head.weight.dtype]
    largest = exact_logits(head._replace(softcap=0.0)).abs().max().item()
    return max(2e-5, head.weight.shape[1] / 16 * step * largest)


def exact_statistics(head):
    """Log-probs [N, V] in float64, and the statistics of the rows rounded from them."""
    logits = exact_logits(head)
    logprobs, here = torch.log_softmax(logits, 1), head.labels[:, None]
    anchor = (logits.gather(1, here)[:, 0] / LN2).float()
    log_total = logits.logsumexp(1) / LN2 - anchor
    entropy = -(logprobs.exp() * logprobs).sum(1)
    stats = Statistics(logprobs.gather(1, here)[:, 0], anchor, log_total, entropy)
    return logprobs, Statistics(*(x.float() for x in stats))


def check_scores(fused, head, kind):
    """Statistics and kept logits of a head against float64, in one run that keeps and one not."""
    logprobs, expected = exact_statistics(head)
    few = kind == "few"
    stats, kept = fused.keep(head, few)
    scored = fused.statistics(head, with_entropy=True, few=few)
    for name in ("logprobs", "logsumexp", "entropy"):
        actual, exact = getattr(scored, name), getattr(expected, name)
        torch.testing.assert_close(actual, exact, rtol=2e-7, atol=tolerance(head))
    # Kept logits below the range stick to its end, e^-44.
    exact = logprobs / LN2 + stats.log_total.double()[:, None]
    error = kept.double() / STEPS - exact.clamp(min=-64)
    assert error.abs().max() <= 0.5 / STEPS + 2e-4
    # After the numbers, so that one run finds what is wrong.
    assert all(map(torch.equal, stats[:3], scored[:3]))


@emulates
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "num_rows", "hidden_size", "vocabulary"), CASES)
def test_scores(fused, make_head, kind, num_rows, hidden_size, vocabulary, dtype):
    head = make_head(num_rows, hidden_size, vocabulary, dtype)
    check_scores(fused, with_temperature(head), kind)


def check_dlogits(fused, head, relative_error):
    """Dlogits from recomputed and from kept logits against the formula of `_maths` in float64."""
    logprobs, stats = exact_statistics(head)
    g, e = torch.randn_like(stats.logprobs), torch.randn_like(stats.logprobs)
    labels = head.labels.clone()
    if len(g) > 1:
        labels[-1] = -1  # the target is in another shard
    here = labels >= 0
    capping = 1.0
    if head.softcap:
        capped = exact_logits(head) / head.inv_temperature.double()[:, None]
        capping = 1 - (capped / head.softcap) ** 2

    def error(actual, gradient):
        constant, target = (x.double()[:, None] for x in (gradient.constant, gradient.target))
        slope = 0 if gradient.slope is None else gradient.slope.double()[:, None]
        expected = logprobs.exp() * (constant + slope * logprobs) * capping
        expected[here, labels[here]] = target[here, 0]
        assert actual.dtype == head.weight.dtype
        return relative_error(actual, expected)

    gradient = row_gradient(head, stats, g, e)
    actual = fused.recompute_dlogits(head._replace(labels=labels), stats, gradient)
    bound = {torch.bfloat16: 3e-3, torch.float16: 4e-4}[head.weight.dtype]
    assert error(actual, gradient) <= bound
    no_slope = (stats.anchor, stats.log_total, gradient.constant, None, gradient.target)
    fused.launch_dlogits(head._replace(labels=labels), actual, *no_slope)
    assert error(actual, gradient._replace(slope=None)) <= bound
    if len(g) > 5:
        stats, kept = fused.keep(head)
        gradient = row_gradient(head, stats, g)
        actual = fused.dlogits_from_kept(kept, head._replace(labels=labels), stats, gradient)
        assert error(actual, gradient) <= 6e-3  # the interpreter truncates to bfloat16


@emulates
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "hidden_size", "vocabulary"), MANY)
def test_dlogits(fused, make_head, relative_error, num_rows, hidden_size, vocabulary, dtype):
    head = make_head(num_rows, hidden_size, vocabulary, dtype)
    check_dlogits(fused, with_temperature(head), relative_error)


@emulates
@pytest.mark.parametrize("softcap", [5.0, 30.0])
@pytest.mark.parametrize(("kind", "sizes"), [("many", MANY[2]), ("few", FEW[1])])
def test_softcap(fused, make_head, relative_error, kind, sizes, softcap):
    """Logits of up to 60, so that many are at the cap and many in the series near 0."""
    head = with_temperature(make_head(*sizes, torch.bfloat16, max_logit=60.0), softcap)
    check_scores(fused, head, kind)
    if kind == "many":
        check_dlogits(fused, head, relative_error)


def launch(fused, head, kind, anchor):
    """The partials of all rows."""
    few, blocks = kind == "few", -(-len(head.weight) // _extension.BLOCK_V[kind])
    partials = torch.full((len(anchor), 3, blocks), torch.nan)
    fused.launch_statistics(head, None, None, anchor, partials, few)
    return partials


@emulates
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["many", "few"])
def test_a_target_in_the_order_of_the_tile_is_met_bit_for_bit(fused, make_head, kind, dtype):
    """An anchor from the same steps of 16 elements of D: x is exactly 0 at the label."""
    h, w, _ = (x.detach() for x in make_head(16, 520, 1, dtype))
    h[3, :7], w[0, 5:40] = 0, 0
    # ln 2 makes the factor to base 2 exactly 1.
    head = Head(h, w, torch.zeros(16, dtype=int), torch.full((16,), LN2))
    partials = launch(fused, head, kind, tensor_core_dot(h, w.expand_as(h)))
    assert torch.equal(partials[:, 2, 0], torch.zeros(16))  # the largest x of the only column
    assert launch(fused, head, kind, (h.double() @ w[0].double()).float())[:, 2].any()


@emulates
def test_truncation_cancels_in_rows_that_are_half_certain(fused):
    """The error of log p at D = 3584 where p is about 1/2, for two ways to the target's logit."""
    h, w = torch.randn(16, 3584), torch.randn(500, 3584) / 3584**0.5
    labels = torch.randint(500, (16,))
    h = 4 * h
    logits = h @ w.T
    lead = logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]
    h += lead[:, None] * w[labels] / w[labels].square().sum(1, keepdim=True)
    head = Head(h.bfloat16(), w.bfloat16(), labels, torch.ones(16))
    exact, stats = exact_statistics(head)
    assert 0.2 < stats.logprobs.exp().min() and stats.logprobs.exp().max() < 0.8

    def error(anchor):
        logprobs = -launch(fused, head, "few", anchor)[:, 0].double().sum(1).log()
        return (logprobs - exact.gather(1, labels[:, None])[:, 0]).abs().max().item()

    exact_target, same_order = (
        error(stats.anchor),
        error(tensor_core_dot(head.hidden_states, head.weight[labels]) / LN2),
    )
    print(f"exact target {exact_target:.1e}, same order {same_order:.1e}, {tolerance(head):.1e}")
    assert same_order <= exact_target / 2 and exact_target <= tolerance(head)


@emulates
@pytest.mark.parametrize("kind", ["many", "few"])
def test_far_targets_are_done_again_around_the_maximum(fused, make_head, push_away, kind):
    """Targets of probability e^-45 to e^-1000: the second run, by flags on the device."""
    head = make_head(128, 64, 500, torch.bfloat16, max_logit=3)
    push_away(head, {0: 45, 77: 120, 127: 1000})
    check_scores(fused, with_temperature(head), kind)


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
    assert launch(fused, head, kind, ones).isfinite().all()  # no flags: all rows


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
    "no device guard": ("linear_logprob.cu", "const DeviceGuard guard(device);", ""),
    "one column too many": ("linear_logprob.cu", "offset < num_columns", "offset <= num_columns"),
    "buffer overwritten while it is stored": (
        "linear_logprob.cu",
        "if (is_first_thread) store_wait();\n          named",
        "named",
    ),
    "few: no device guard": ("last_token.cu", "const DeviceGuard guard(device);", ""),
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
        check_scores(broken, with_temperature(head), kind)
    print(f"{error}: {str(caught.value).strip().splitlines()[0]}")
