"""Sizes of real heads, and random inputs that look like a language model's.

N rows, D hidden, V vocabulary. With w_v ~ N(0, 1/D) and h ~ N(0, SPREAD^2), background logits
have the standard deviation SPREAD; half the rows then move towards their label until they are
nearly certain of it, as most tokens of a text are. Kernels that skip small probabilities, and the
power that a GEMM draws, depend on such data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """A head: its model's name, D and V."""

    name: str
    hidden_size: int
    vocabulary: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-7b", 3584, 152064),
        Shape("qwen2.5-1.5b", 1536, 151936),
        Shape("llama-3-8b", 4096, 128256),
        Shape("qwen3-0.6b", 1024, 151936),
        Shape("gemma-2-2b", 2304, 256000),  # without its soft-capping
        Shape("cpu", 512, 32000),
        Shape("smoke", 64, 997),
    )
}
ROWS = (8, 64, 256, 1024, 8192, 32768)

SPREAD = 2.0
# A certain row's label is this many nats above the background: exp of 13.9, for V = 152k, would
# make it as probable as all other tokens together.
LOWEST_LEAD, HIGHEST_LEAD = 14.0, 28.0


@dataclass(frozen=True)
class Inputs:
    """One set of inputs. `row_weight` is the upstream gradient: non-uniform and of both signs."""

    hidden_states: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [N]
    row_weight: Tensor  # [N] float32

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """What gradients are asked for."""
        return self.hidden_states, self.weight


def make_inputs(
    shape: Shape, num_rows: int, dtype: torch.dtype, device: torch.device, *, seed: int
) -> Inputs:
    """Random inputs; see the module's docstring."""
    rng = torch.Generator(device).manual_seed(seed)
    like = {"device": device, "generator": rng}
    D, V = shape.hidden_size, shape.vocabulary
    weight = (torch.randn(V, D, **like) / D**0.5).to(dtype)
    labels = torch.randint(V, (num_rows,), **like)
    lead = LOWEST_LEAD + (HIGHEST_LEAD - LOWEST_LEAD) * torch.rand(num_rows, **like)
    lead *= torch.rand(num_rows, **like) < 0.5
    hidden_states = SPREAD * torch.randn(num_rows, D, **like) + lead[:, None] * weight[labels]
    return Inputs(
        hidden_states.to(dtype).requires_grad_(),
        weight.requires_grad_(),
        labels,
        torch.randn(num_rows, **like) / num_rows,
    )


def make_input_sets(
    shape: Shape, num_rows: int, dtype: torch.dtype, device: torch.device
) -> list[Inputs]:
    """Enough sets that using them in turn finds nothing in a GPU's L2; one set on a CPU."""
    count = 1
    if device.type == "cuda":
        num_bytes = (num_rows + shape.vocabulary) * shape.hidden_size * dtype.itemsize
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        count = 1 + -(-2 * l2 // num_bytes)
    return [make_inputs(shape, num_rows, dtype, device, seed=seed) for seed in range(count)]
