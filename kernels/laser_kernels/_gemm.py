"""The three GEMMs around the softmax, each with a float32 accumulator that is never rounded.

On a GPU 16-bit operands go to cuBLAS with float32 output. The CPU has no such GEMM: there operands
are widened, the weight block by block, so that no float32 copy of a 16-bit weight ever exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._vocab_parallel import sum_over_shards

# Rows of a 16-bit weight that are widened, or of a scaled product that exists, at a time.
BLOCK_V = 8192


def logits(hidden_states: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return H W^T as float32 [n, V], on a CPU in `out` if there is one."""
    if hidden_states.is_cuda:
        return _mm(hidden_states, weight.T)
    if out is None:
        out = hidden_states.new_empty(len(hidden_states), len(weight), dtype=torch.float32)
    for columns in _weight_blocks(weight):
        _mm(hidden_states, weight[columns].T, out=out[:, columns])
    return out


def hidden_gradient(dlogits: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return (dZ W) * scale as float32 [n, D]."""
    if dlogits.is_cuda:
        out = _mm(dlogits, weight)
    else:
        first, *others = _weight_blocks(weight)
        out = _mm(dlogits[:, first], weight[first])
        for columns in others:
            out.addmm_(dlogits[:, columns].float(), weight[columns].float())
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
            product = _mm(dlogits[:, columns].T, hidden_states).mul_(scale)
            out[columns].copy_(product) if is_first else out[columns].add_(product)
    elif is_first:
        _mm(dlogits.T, hidden_states, out=out)
    elif _is_cublas_16_bit(dlogits):
        torch.addmm(out, dlogits.T, hidden_states, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(dlogits.T.float(), hidden_states.float())


def weight_gradient(dlogits: Tensor, hidden_states: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return (dZ^T H) * scale of a single chunk as [V, D] in the dtype of H."""
    shape, dtype = (dlogits.shape[1], hidden_states.shape[1]), hidden_states.dtype
    if _is_cublas_16_bit(dlogits) and scale is None:
        # The GEMM itself rounds its accumulator.
        return torch.mm(dlogits.T, hidden_states, out=hidden_states.new_empty(shape))
    out = hidden_states.new_empty(shape, dtype=torch.float32)
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
    group: str,
) -> None:
    """Turn the dlogits of a chunk into the gradients that are wanted."""
    if grad_hidden is not None:
        grad_hidden.copy_(sum_over_shards(hidden_gradient(dlogits, weight, scale), group))
    if grad_weight is not None:
        add_weight_gradient(grad_weight, dlogits, hidden_states, is_first, scale)


def _is_cublas_16_bit(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float32


def _mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a b in float32, also under autocast, which would round the operands."""
    with torch.autocast(a.device.type, enabled=False):
        if not _is_cublas_16_bit(a):
            return torch.mm(a.float(), b.float(), out=out)
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _weight_blocks(weight: Tensor) -> list[slice]:
    """Row blocks of the weight; a float32 weight needs no widening and is one block."""
    step = len(weight) if weight.dtype == torch.float32 else BLOCK_V
    return [slice(start, start + step) for start in range(0, len(weight), step)]
