"""Heads with language-model-like logits, and how gradients are compared.

Every comparison is with float64 on the same rounded inputs; half of the rows are peaked.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

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
