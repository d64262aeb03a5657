"""Single Triton kernels, in the interpreter or on a GPU; the public ops are tested elsewhere."""

from contextlib import contextmanager

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from laser_kernels import _chunked, _fused, _head_kernels, _row_kernels
from laser_kernels._maths import Head, row_gradient

# numpy reports overflow: where it is meant, and in the padding of rows, which is not initialised.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ELEMENTWISE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SOFTCAPS = [0.0, 5.0, 30.0, 1000.0]
LN2 = 0.6931471805599453


@pytest.fixture(params=[False, True], ids=["odd", "padded"])
def make_rows(request, device):
    """Logits of 5 rows, one of them wide, all of them below zero; V is beyond one block."""

    def make(softcap=0.0):
        n, v = 5, _row_kernels.BLOCK_V + 333
        no_matrices = torch.empty(2, 0, device=device)
        logits = torch.full((n, v), torch.nan, device=device)
        if request.param:
            logits = _fused.empty_rows(torch.empty(n, 0), torch.empty(v, 0), torch.float32)
            logits = logits.to(device).fill_(torch.nan)
        assert (logits.stride(0) % 8 == 0) == request.param
        widths = torch.tensor([[1.0], [20], [70], [900], [5]])
        logits.copy_(-torch.rand(n, v) * widths - 2)
        labels = torch.randint(v, (n,), device=device)
        inv_temperature = torch.rand(n, device=device) + 0.5
        return logits, Head(*no_matrices, labels, inv_temperature, softcap)

    return make


def exact_logits(logits, head):
    """Capped and tempered, in float64."""
    logits = logits.double()
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits * head.inv_temperature.double()[:, None]


def exact_statistics(logits, head):
    """Log-probs, logsumexp and entropy; -1 is a label whose logit is a constant elsewhere."""
    z = exact_logits(logits, head)
    logprobs, logsumexp = torch.log_softmax(z, 1), z.logsumexp(1)
    here = logprobs.gather(1, head.labels.clamp(min=0)[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(1)
    return torch.where(head.labels < 0, -logsumexp, here), logsumexp, entropy


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_row_statistics(make_rows, softcap):
    rows = make_rows(softcap)
    stats = _row_kernels.statistics(*rows)
    found = (stats.logprobs, stats.logsumexp, stats.entropy)
    for actual, exact in zip(found, exact_statistics(*rows), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", ELEMENTWISE_DTYPES)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_row_dlogits_in_place(make_rows, dtype, with_entropy, softcap):
    logits, head = make_rows(softcap)
    stats = _row_kernels.statistics(logits, head)
    g = torch.randn_like(stats.logprobs)
    e = torch.randn_like(g) if with_entropy else None
    head.labels[0] = -1  # the target is in another shard
    exact = logits.double().requires_grad_()
    logprobs, _, entropy = exact_statistics(exact, head)
    loss = (g * logprobs).sum() + (0 if e is None else (e * entropy).sum())
    (expected,) = torch.autograd.grad(loss, exact)
    memory = logits.data_ptr()
    head = head._replace(hidden_states=head.hidden_states.to(dtype))
    actual = _row_kernels.dlogits_(logits, head, stats, row_gradient(head, stats, g, e))
    assert actual.dtype == dtype and actual.data_ptr() == memory
    # The interpreter truncates to bfloat16, a GPU rounds.
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=1e-6)


def test_kept_logits_cost_no_accuracy(device, relative_error):
    """Steps of 2^-9 under dlogits of 8 bits: at most 1.1 times the error of only the 8 bits."""
    n, v = 16, _fused.UNPACK_BLOCK + 100
    x = torch.randn(n, v, dtype=torch.float64) * 8  # log2 units, around the anchor
    kept = (x * 512).round().clamp(-(2**15), 2**15 - 1).to(device, torch.int16)
    anchor, log_total = torch.zeros(n, device=device), x.exp2().sum(1).log2().float().to(device)
    labels = torch.full((n,), -1, device=device)
    constant, target = torch.randn(2, n, device=device)
    actual = torch.empty(n, v, device=device)  # float32: the interpreter truncates to bfloat16
    rows = (labels, torch.ones_like(anchor), anchor, log_total, constant, target)
    sizes = (v, v // 4, 0.0, 4, _fused.UNPACK_BLOCK)
    _head_kernels.unpack_kernel[(n, 2)](kept, actual, *rows, *sizes)
    exact = torch.softmax(x * LN2, 1) * constant.cpu().double()[:, None]
    baseline = relative_error(exact.bfloat16(), exact)
    assert relative_error(actual.cpu().bfloat16(), exact) <= 1.1 * baseline


def test_only_padding_that_exists_is_used():
    """A clone of a single row keeps the stride, but its memory ends with the row."""
    kept = _fused.empty_rows(torch.empty(3, 0), torch.empty(97, 0), torch.int16)
    assert _fused.row_alignment(kept) == _fused.row_alignment(kept[1:2]) == (8, 13)
    assert kept[2:].clone().stride(0) == 104 and _fused.row_alignment(kept[2:].clone()) == (1, 104)
    assert _fused.row_alignment(kept.clone()) == (1, 97)


class OnGpu(torch.Tensor):
    is_cuda = True


def test_chunks_on_a_gpu_have_padded_rows():
    h, w = torch.empty(3, 8), torch.empty(97, 8)
    assert _chunked.empty_kept(h, w).stride() == (97, 1)
    assert _chunked.empty_kept(h.as_subclass(OnGpu), w).stride() == (104, 1)


def check_kept(kept, stats, expected):
    """Kept logits against log-probs [n, V] in float64."""
    x = expected / LN2 + stats.log_total[:, None].double()
    error = kept.double() / 512 - x.clamp(min=-64)
    assert error.abs().max() <= 1.2 / 1024  # half a step, and the float32 of x


@pytest.mark.parametrize("hidden_size", [16, 25])  # TMA can address rows of 16, not of 25
def test_tiles_by_descriptor_and_by_pointer(hidden_size, make_head):
    h, w, labels = (x.detach() for x in make_head(20, hidden_size, 97, torch.float16))
    head = Head(h, w, labels, torch.ones(20, device=h.device))
    assert _fused.tile_for(head, few=False).uses_tma == (hidden_size == 16)
    stats, kept = _fused.TRITON.keep(head)
    logits = h.double() @ w.double().T
    torch.testing.assert_close(stats.logsumexp.double(), logits.logsumexp(1), rtol=0, atol=2e-5)
    check_kept(kept, stats, torch.log_softmax(logits, 1))


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_capped_tiles_against_float64(make_head, relative_error, softcap, with_entropy):
    """Statistics, kept logits, and dlogits in both ways; logits reach twice the cap."""
    largest = min(2 * softcap, 30) or 30
    h, w, labels = (x.detach() for x in make_head(20, 16, 97, torch.float16, max_logit=largest))
    head = Head(h, w, labels, torch.rand(20, device=h.device) + 0.5, softcap)
    raw = (h.double() @ w.double().T).requires_grad_()
    exact = exact_statistics(raw, head)
    stats = _fused.TRITON.statistics(head, with_entropy=with_entropy)
    found = (stats.logprobs, stats.logsumexp, stats.entropy)
    assert len(stats.entropy) == (20 if with_entropy else 0)
    for a, b in zip(found[: 2 + with_entropy], exact, strict=False):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=2e-5)
    g = torch.randn(20, device=h.device)
    e = torch.randn_like(g) if with_entropy else None
    loss = (g * exact[0]).sum() + (0 if e is None else (e * exact[2]).sum())
    (expected,) = torch.autograd.grad(loss, raw)
    gradient = row_gradient(head, stats, g, e)
    assert relative_error(_fused.TRITON.recompute_dlogits(head, stats, gradient), expected) <= 4e-4
    if not with_entropy:
        stats, kept = _fused.TRITON.keep(head)
        check_kept(kept, stats, torch.log_softmax(exact_logits(raw, head), 1))
        actual = _fused.TRITON.dlogits_from_kept(kept, head, stats, gradient)
        assert relative_error(actual, expected) <= 1e-3


def test_target_has_the_bits_of_the_tile(make_head):
    """Where the label has the largest logit, the maximum of x is exactly 0."""
    h, w, labels = (x.detach() for x in make_head(70, 200, 97, torch.float16))
    logits = h.double() @ w.double().T
    head = Head(h, w, logits.argmax(1), torch.rand(70, device=h.device) + 0.5)
    target, anchor = torch.empty(2, 70, device=h.device)
    flags = torch.full((71,), 7, dtype=torch.int32, device=h.device)
    _fused.TRITON._launch_anchor(head, False, target, anchor, flags)
    partials = torch.full((70, 3, -(-97 // _fused.tile_for(head, few=False).v)), torch.nan)
    partials = partials.to(h.device)
    asked = dict(few=False, with_entropy=False, with_maximum=True)
    _fused.TRITON.launch_statistics(head, None, None, anchor, partials, **asked)
    assert torch.equal(target, anchor) and not flags.any()
    # A GPU fuses the multiply-add, and so sees the rounding of the anchor.
    rounding = anchor.abs() * 2**-24 if h.is_cuda else 0
    assert (partials[:, 2].amax(1).abs() <= rounding).all()


def test_far_targets_leave_kept_logits_of_the_second_run(make_head, push_away):
    """x beyond 64 would wrap around in 16 bits; such a row is always done again."""
    head = make_head(40, 16, 97, torch.float16, max_logit=3)
    push_away(head, {0: 46, 17: 60, 39: 700})
    h, w, labels = (x.detach() for x in head)
    head = Head(h, w, labels, torch.ones(40, device=h.device))
    logprobs = torch.log_softmax(h.double() @ w.double().T, 1)
    for few in (False, True):
        stats, kept = _fused.TRITON.keep(head, few)
        check_kept(kept, stats, logprobs)
        exact = logprobs.gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(stats.logprobs.double(), exact, rtol=1e-6, atol=2e-5)


class Recorder(_fused.Fused):
    def __init__(self):
        self.passes = []

    def launch_statistics(self, *args, **asked):
        self.passes.append((args[-1], args[2] is not None, asked["with_maximum"]))
        super().launch_statistics(*args, **asked)


@pytest.mark.parametrize("num_rows", [64, 65])
def test_few_rows_are_at_most_64(make_head, num_rows):
    """Their tile reads W once for each 64 rows; and only there the first pass has the maximum."""
    h, w, labels = (x.detach() for x in make_head(num_rows, 16, 40, torch.float16))
    recorder = Recorder()
    recorder.statistics(Head(h, w, labels, torch.ones(num_rows, device=h.device)), few=True)
    few = [(True, False, True), (True, True, True)]
    many = [(False, False, False), (False, True, True), (False, True, True)]
    assert recorder.passes == (few if num_rows == 64 else many)


@pytest.mark.skipif(torch.cuda.is_available(), reason="records the launches of the interpreter")
def test_every_launch_is_on_the_device_of_its_tensors(make_head, make_rows, monkeypatch):
    """Triton launches on the current device, which may be another one."""
    inside, launched = [], {}

    @contextmanager
    def guard(x):
        inside.append(x)
        yield
        inside.pop()

    run = GridExecutor.__call__

    def record(self, *args, **kwargs):
        launched[self.fn.__name__] = len(inside)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", guard)
    monkeypatch.setattr(GridExecutor, "__call__", record)
    h, w, labels = (x.detach() for x in make_head(3, 16, 40, torch.float16))
    head = Head(h, w, labels, torch.ones(3))
    stats, kept = _fused.TRITON.keep(head)
    gradient = row_gradient(head, stats, torch.ones(3))
    _fused.TRITON.dlogits_from_kept(kept, head, stats, gradient)
    _fused.TRITON.recompute_dlogits(head, stats, gradient)
    logits, head = make_rows()
    stats = _row_kernels.statistics(logits, head)
    _row_kernels.dlogits_(logits, head, stats, row_gradient(head, stats, torch.ones(5)))
    _row_kernels.scale_(torch.ones(5), torch.tensor(2.0))
    kernels = {
        name
        for module in (_head_kernels, _row_kernels)
        for name, x in vars(module).items()
        if name.endswith("_kernel")
    }
    assert launched == dict.fromkeys(kernels, 1)


def test_only_overflowing_row_blocks_run_again(make_head, push_away):
    """A second pass over a plain batch would be wasted, one over row 0 only is right."""
    head = make_head(40, 16, 97, torch.float16, max_logit=3)
    push_away(head, {0: 200})
    h, w, labels = (x.detach() for x in head)
    ones, anchor = torch.ones(40, device=h.device), torch.zeros(40, device=h.device)
    head = Head(h, w, labels, ones)
    tile = _fused.tile_for(head, few=False)
    flags = torch.zeros(41, dtype=torch.int32, device=h.device)
    flags[[0, 40]] = 1
    partials = torch.full((40, 3, -(-97 // tile.v)), float("nan"), device=h.device)
    for entropy, maximum in ((True, True), (False, True), (True, False)):
        asked = dict(few=False, with_entropy=entropy, with_maximum=maximum)
        partials.fill_(torch.nan)
        _fused.TRITON.launch_statistics(head, None, flags, anchor, partials, **asked)
        written = partials[: tile.n].isfinite().all(2).all(0).tolist()
        assert written == [True, entropy, maximum]
        assert partials[tile.n :].isnan().all()
    flags.zero_(), partials.fill_(float("nan"))
    _fused.TRITON.launch_statistics(head, None, flags, anchor, partials, **asked)
    assert partials.isnan().all()
