"""The three GEMMs around the softmax, each with a float32 accumulator that is never rounded.

On a GPU 16-bit operands go to cuBLAS with float32 output. The CPU has no such GEMM: there a 16-bit
weight is widened block by block, so that no full float32 copy of it ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._vocab_parallel import sum_over_shards

# Rows of a 16-bit weight that are widened, or of a scaled product that exists, at a time.
BLOCK_V = 8192


def logits(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Return H W^T as float32 [n, V]."""
    if hidden_states.is_cuda:
        return _mm_float32(hidden_states, weight.T)
    out = hidden_states.new_empty(len(hidden_states), len(weight), dtype=torch.float32)
    for columns, block in _float32_blocks(weight):
        torch.mm(hidden_states.float(), block.T, out=out[:, columns])
    return out


def hidden_gradient(dlogits: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return (dZ W) * scale as float32 [n, D]."""
    if dlogits.is_cuda:
        out = _mm_float32(dlogits, weight)
    else:
        out = dlogits.new_zeros(len(dlogits), weight.shape[1])
        for columns, block in _float32_blocks(weight):
            out.addmm_(dlogits[:, columns], block)
    return out if scale is None else out.mul_(scale)


def add_weight_gradient(
    out: Tensor,  # [V, D] float32
    dlogits: Tensor,  # [n, V]
    hidden_states: Tensor,  # [n, D]
    is_first: bool,
    scale: Tensor | None = None,
) -> None:
    """Add (dZ^T H) * scale to `out`; the first chunk overwrites it and saves a fill and a read."""
    if scale is not None:
        for start in range(0, len(out), BLOCK_V):
            columns = slice(start, start + BLOCK_V)
            product = _mm_float32(dlogits[:, columns].T, hidden_states.to(dlogits.dtype))
            product.mul_(scale)
            out[columns].copy_(product) if is_first else out[columns].add_(product)
    elif is_first:
        _mm_float32(dlogits.T, hidden_states.to(dlogits.dtype), out=out)
    elif dlogits.dtype == torch.float32:
        out.addmm_(dlogits.T, hidden_states.float())
    else:
        torch.addmm(out, dlogits.T, hidden_states, out_dtype=torch.float32, out=out)


def weight_gradient(dlogits: Tensor, hidden_states: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return dZ^T H of a single chunk [V, D] in the dtype of H; the GEMM rounds where it can."""
    dtype = hidden_states.dtype
    if dlogits.dtype == dtype and scale is None:
        return torch.mm(dlogits.T, hidden_states)
    out = torch.empty(
        dlogits.shape[1], hidden_states.shape[1], dtype=torch.float32, device=dlogits.device
    )
    add_weight_gradient(out, dlogits, hidden_states, True, scale)
    return out.to(dtype)


def weight_accumulator(weight: Tensor, num_rows: int) -> Tensor:
    """Return a float32 buffer for dW: the first chunk overwrites it, without chunks it is zero."""
    make = torch.empty if num_rows else torch.zeros
    return make(weight.shape, dtype=torch.float32, device=weight.device)


def apply_dlogits(
    dlogits: Tensor,  # [n, V]
    scale: Tensor | None,  # the factor that dlogits lack
    hidden_states: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    grad_hidden: Tensor | None,  # [n, D], written
    grad_weight: Tensor | None,  # [V, D] float32, accumulated
    is_first: bool,
    group: str = "",
) -> None:
    """Turn the dlogits of a chunk into the gradients that are wanted."""
    if grad_hidden is not None:
        grad_hidden.copy_(sum_over_shards(hidden_gradient(dlogits, weight, scale), group))
    if grad_weight is not None:
        add_weight_gradient(grad_weight, dlogits, hidden_states, is_first, scale)


def _mm_float32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _float32_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield row blocks of the weight in float32; a float32 weight is one block, uncopied."""
    step = len(weight) if weight.dtype == torch.float32 else BLOCK_V
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield rows, weight[rows].float()
