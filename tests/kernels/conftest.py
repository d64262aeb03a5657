"""Heads with language-model-like logits, and how gradients are compared.

Every comparison is with float64 on the same rounded inputs; half of the rows are peaked.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from laser_kernels import (
    last_token_loss,
    linear_logprob,
    linear_logprob_entropy,
    linear_logprob_loss,
)

HAS_GPU = torch.cuda.is_available()
# bf16 tl.dot is wrong in Triton's interpreter (triton-lang/triton#11584): float16 stands in there.
TRITON_DTYPES = (torch.bfloat16, torch.float16) if HAS_GPU else (torch.float16,)
CHUNKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [("chunked", dtype) for dtype in CHUNKED_DTYPES] + [
    ("triton", dtype) for dtype in TRITON_DTYPES
]


class Head(NamedTuple):
    hidden_states: Tensor  # [N, D], requires grad
    weight: Tensor  # [V, D], requires grad
    labels: Tensor  # [N]

    def float64(self) -> "Head":
        h, w = (x.detach().double().requires_grad_() for x in self[:2])
        return Head(h, w, self.labels)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1]).split('.')[1]}")
def case(request) -> tuple[str, torch.dtype]:
    """An implementation and a dtype that it takes."""
    return request.param


@pytest.fixture
def make_head(device) -> Callable[..., Head]:
    def make(num_rows, hidden_size, vocabulary, dtype, max_logit=30.0) -> Head:
        weight = torch.randn(vocabulary, hidden_size, dtype=torch.float64) / 4
        labels = torch.randint(vocabulary, (num_rows,))
        hidden_states = torch.randn(num_rows, hidden_size, dtype=torch.float64)
        hidden_states[::2] += 3 * weight[labels[::2]]
        if num_rows:
            hidden_states *= max_logit / (hidden_states @ weight.T).abs().max()
        h, w = (x.to(device, dtype).requires_grad_() for x in (hidden_states, weight))
        return Head(h, w, labels.to(device))

    return make


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    def error(actual: Tensor, exact: Tensor) -> float:
        """Frobenius norm of the difference, relative to the exact one."""
        assert actual.shape == exact.shape
        return ((actual.double() - exact).norm() / exact.norm()).item()

    return error


def rounded_dlogits_gradients(head: tuple, grad_logprobs: Tensor, temperature: Tensor):
    """Gradients of log-probs from float32 logits and dlogits rounded to bfloat16: the baseline."""
    hidden_states, weight, labels = head
    h, w = hidden_states.detach().float(), weight.detach().float()
    logits = h @ w.T / temperature[:, None]
    dlogits = -torch.softmax(logits, 1) * grad_logprobs[:, None]
    rows = torch.arange(len(logits), device=logits.device)
    dlogits[rows, labels] += grad_logprobs
    dlogits = (dlogits / temperature[:, None]).bfloat16().float()
    return (dlogits @ w).to(weight.dtype), (dlogits.T @ h).to(weight.dtype)


@pytest.fixture
def baseline_gradients():
    return rounded_dlogits_gradients


@pytest.fixture
def scalar_ops() -> dict[str, Callable[..., Tensor]]:
    """Every op with a gradient as a function of h, w, labels, impl and one number g a row."""

    def logprob(h, w, labels, impl, g):
        return (linear_logprob(h, w, labels, temperature=0.7, impl=impl) * g).sum()

    def entropy(h, w, labels, impl, g):
        logprobs, entropy = linear_logprob_entropy(h, w, labels, impl=impl)
        return (logprobs * g + entropy * g.flip(0)).sum()

    def loss(h, w, labels, impl, g):
        def loss_fn(logprobs, rows):
            return (g[rows] * logprobs.exp()).sum()

        return linear_logprob_loss(h, w, labels, loss_fn, impl=impl)

    def last_token(h, w, labels, impl, g):
        return last_token_loss(h, w, 3, g, beta=0.1, ref_logprob=-4.0, impl=impl)[0]

    return {f.__name__: f for f in (logprob, entropy, loss, last_token)}


@pytest.fixture
def push_away() -> Callable[..., None]:
    def push(head: tuple, gaps: dict[int, float]) -> None:
        """Give rows a target, token 5, that lies about that many nats below the maximum."""
        hidden_states, weight, labels = head
        with torch.no_grad():
            weight[:, 0] = 0
            weight[5, 0] = -1
            hidden_states[:, 0] = 0
            for row, gap in gaps.items():
                labels[row] = 5
                hidden_states[row, 0] = gap

    return push
