"""Row kernels of impl="chunked" on a GPU: one program walks one row of float32 logits [n, V].

    statistics   reads the row once, around a running maximum
    dlogits_     reads it again and writes dL/dlogits in the dtype of the GEMM operands, in place

    scale_       multiplies a gradient by the upstream scalar, or leaves at once if that is 1

In place means that a 16-bit row lies in the first half of its float32 row. Block b of B elements is
read from bytes [4 b B, 4 (b + 1) B) and written to [2 b B, 2 (b + 1) B), which holds only what was
read already; the barrier makes that true of all threads of the program. Rows are padded, and the
padding is read and written like the rest, so that accesses are 16 bytes whatever V is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fused import launch, row_alignment
from ._head_kernels import LN2, cap, dlogits_from_logprob, padded, row_statistics
from ._maths import Head, RowGradient, Statistics

# 8 float32 a thread in flight: enough to stream a row at memory speed.
BLOCK_V = 4096
NUM_WARPS = 16
# Programs of `scale_`: few, since most of the time they leave at once.
MAX_PROGRAMS = 1024


@triton.jit
def _row_statistics_kernel(
    logits_ptr,
    labels_ptr,
    inv_temperature_ptr,
    logprobs_ptr,
    anchor_ptr,
    log_total_ptr,
    entropy_ptr,
    V,
    stride_n,
    SOFTCAP: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * (stride_n * ALIGN)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    # Any finite logit of the row can start the running maximum; 0 or -inf could not.
    first, scale = cap(tl.load(row_ptr), inv_temperature, SOFTCAP)
    anchor = first * scale
    total = 0.0
    weighted = 0.0
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        mask = columns < V
        z = tl.load(row_ptr + columns, mask=columns < padded(V, ALIGN), other=0.0)
        t, _ = cap(z, inv_temperature, SOFTCAP)
        z = tl.where(mask, t * scale, -float("inf"))
        highest = tl.maximum(anchor, tl.max(z, 0))
        rescale = tl.exp2(anchor - highest)
        weighted = rescale * (weighted + (anchor - highest) * total)
        total = rescale * total
        anchor = highest
        x = tl.where(mask, z - anchor, 0.0)
        exp = tl.where(mask, tl.exp2(x), 0.0)
        total += tl.sum(exp, 0)
        weighted += tl.sum(exp * x, 0)
    target, _ = cap(tl.load(row_ptr + tl.load(labels_ptr + row)), inv_temperature, SOFTCAP)
    logprob, log_total, entropy = row_statistics(target * scale, anchor, total, weighted)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(anchor_ptr + row, anchor)
    tl.store(log_total_ptr + row, log_total)
    tl.store(entropy_ptr + row, entropy)


@triton.jit
def _row_dlogits_kernel(
    logits_ptr,
    dlogits_ptr,
    labels_ptr,
    inv_temperature_ptr,
    anchor_ptr,
    log_total_ptr,
    constant_ptr,
    slope_ptr,
    target_ptr,
    V,
    stride_n,  # of the logits
    SOFTCAP: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int32)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    anchor = tl.load(anchor_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    constant = tl.load(constant_ptr + row)
    slope = None
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + row) * LN2
    target = tl.load(target_ptr + row)
    logits_ptr += row * (stride_n * ALIGN)
    # A 16-bit row begins where its float32 row does.
    per_logit: tl.constexpr = 32 // dlogits_ptr.dtype.element_ty.primitive_bitwidth
    dlogits_ptr += row * (stride_n * ALIGN * per_logit)
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        mask = columns < padded(V, ALIGN)
        z = tl.load(logits_ptr + columns, mask=mask, other=0.0)
        t, scale = cap(z, inv_temperature, SOFTCAP)
        logprob2 = (t * scale - anchor) - log_total
        d = dlogits_from_logprob(logprob2, constant, slope, target, columns == label, t, SOFTCAP)
        tl.debug_barrier()
        tl.store(dlogits_ptr + columns, d.to(dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_kernel(grad_ptr, scale_ptr, size, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr)
    if scale != 1:
        for start in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
            position = tl.cast(start, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = position < size
            x = tl.load(grad_ptr + position, mask=mask).to(tl.float32) * scale
            tl.store(grad_ptr + position, x.to(grad_ptr.dtype.element_ty), mask=mask)


def statistics(logits: Tensor, head: Head) -> Statistics:
    """Reduce float32 logits [n, V], as the GEMM left them, to the statistics of the rows."""
    stats = Statistics(*(torch.empty_like(head.inv_temperature) for _ in range(4)))
    rows = (head.labels, head.inv_temperature, *stats)
    _launch(_row_statistics_kernel, logits, head, *rows)
    return stats


def dlogits_(
    logits: Tensor,  # [n, V] float32, overwritten
    head: Head,
    stats: Statistics,
    gradient: RowGradient,
) -> Tensor:
    """Turn logits into dlogits [n, V] in the dtype of the head, in the memory of the logits."""
    out = logits.view(head.hidden_states.dtype)[:, : logits.shape[1]]
    rows = (head.labels, head.inv_temperature, stats.anchor, stats.log_total, *gradient)
    _launch(_row_dlogits_kernel, logits, head, out, *rows)
    return out


def scale_(grad: Tensor, scale: Tensor) -> Tensor:
    """Multiply a contiguous gradient by a float32 scalar on the same device, in place."""
    grid = (min(triton.cdiv(grad.numel(), BLOCK_V), MAX_PROGRAMS),)
    launch(_scale_kernel, grid, grad, grad, scale, grad.numel(), BLOCK_V, num_warps=NUM_WARPS)
    return grad


def _launch(kernel: triton.JITFunction, logits: Tensor, head: Head, *rows: Tensor | None) -> None:
    """Launch one program a row."""
    align, stride = row_alignment(logits)
    arguments = (logits, *rows, logits.shape[1], stride, head.softcap, align, BLOCK_V)
    launch(kernel, (len(logits),), logits, *arguments, num_warps=NUM_WARPS)
