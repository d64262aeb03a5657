"""Single Triton kernels, in the interpreter or on a GPU; the public ops are tested elsewhere."""

import pytest
import torch

from laser_kernels import _fused, _head_kernels, _row_kernels
from laser_kernels._maths import Head, row_gradient

ELEMENTWISE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def rows(device):
    """Logits of 5 rows, one of them wide, all of them below zero; V is beyond one block."""
    n, v = 5, _row_kernels.BLOCK_V + 333
    logits = -torch.rand(n, v, device=device) * torch.tensor([[1.0], [20], [70], [900], [5]]).to(
        device
    )
    logits -= 2
    labels = torch.randint(v, (n,), device=device)
    inv_temperature = torch.rand(n, device=device) + 0.5
    no_matrices = logits.new_empty(2, 0)
    return logits, Head(*no_matrices, labels, inv_temperature)


def exact_statistics(logits, head):
    """Log-probs, logsumexp and entropy in float64."""
    labels, inv_temperature = head.labels, head.inv_temperature
    logprobs = torch.log_softmax(logits.double() * inv_temperature.double()[:, None], 1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    logsumexp = (logits.double() * inv_temperature.double()[:, None]).logsumexp(1)
    return logprobs.gather(1, labels[:, None])[:, 0], logsumexp, entropy


def test_row_statistics(rows):
    stats = _row_kernels.statistics(*rows)
    found = (stats.logprobs, stats.logsumexp, stats.entropy)
    for actual, exact in zip(found, exact_statistics(*rows), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", ELEMENTWISE_DTYPES)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_row_dlogits_in_place(rows, dtype, with_entropy):
    logits, head = rows
    labels, stats = head.labels, _row_kernels.statistics(*rows)
    g = torch.randn_like(stats.logprobs)
    e = torch.randn_like(g) if with_entropy else None
    labels[0] = -1  # the target is in another shard
    gradient = row_gradient(head, stats, g, e)
    slope = 0 if e is None else gradient.slope.double()[:, None]
    z = torch.log_softmax(logits.double() * head.inv_temperature.double()[:, None], 1)
    expected = z.exp() * (gradient.constant.double()[:, None] + slope * z)
    expected[range(1, 5), labels[1:]] = gradient.target[1:].double()
    memory = logits.data_ptr()
    head = head._replace(hidden_states=head.hidden_states.to(dtype))
    actual = _row_kernels.dlogits_(logits, head, stats, gradient)
    assert actual.dtype == dtype and actual.data_ptr() == memory
    # The interpreter truncates to bfloat16, a GPU rounds.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
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
    rows = (labels, torch.ones_like(anchor), anchor, log_total, constant, target, v, v, 0.0)
    _head_kernels.unpack_kernel[(n, 2)](kept, actual, *rows, BLOCK_V=_fused.UNPACK_BLOCK)
    exact = torch.softmax(x * 0.6931471805599453, 1) * constant.cpu().double()[:, None]
    baseline = relative_error(exact.bfloat16(), exact)
    assert relative_error(actual.cpu().bfloat16(), exact) <= 1.1 * baseline


@pytest.mark.parametrize("hidden_size", [16, 25])  # TMA can address rows of 16, not of 25
def test_tiles_by_descriptor_and_by_pointer(hidden_size, make_head):
    h, w, labels = (x.detach() for x in make_head(20, hidden_size, 97, torch.float16))
    head = Head(h, w, labels, torch.ones(20, device=h.device))
    assert _fused.tile_for(head, few=False).uses_tma == (hidden_size == 16)
    stats, kept = _fused.TRITON.keep(head)
    logits = h.double() @ w.double().T
    torch.testing.assert_close(stats.logsumexp.double(), logits.logsumexp(1), rtol=0, atol=2e-5)
    actual = (kept.double() / 512 - stats.log_total[:, None]) * 0.6931471805599453
    expected = torch.log_softmax(logits, 1)
    inside = expected > -40  # below, the kept logit saturates at 2^-64
    assert (actual - expected)[inside].abs().max() <= 1e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy reports the overflow that is meant
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
    _fused.TRITON.launch_statistics(head, None, flags, anchor, partials, few=False)
    assert partials[: tile.n].isfinite().all()
    assert partials[tile.n :].isnan().all()
    flags.zero_(), partials.fill_(float("nan"))
    _fused.TRITON.launch_statistics(head, None, flags, anchor, partials, few=False)
    assert partials.isnan().all()
