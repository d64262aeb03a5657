"""Triton kernels of the head: H W^T with a softmax epilogue that stays in registers.

All exponents are in base 2. With x_iv = z_iv log2(e) - anchor_i, a row needs

    S = sum_v 2^x_v        M = sum_v x_v 2^x_v        and log2 p_v = x_v - log2 S

The anchor is not the maximum but the target's own logit, a dot product per row. It is known
beforehand, and spares the epilogue a running maximum and the rescaling that goes with it. S, M and
the maximum of x leave a tile as partials and are reduced later in a fixed order. A target far below
the maximum would overflow: rows with S >= 2^60 (p_y < 1e-18) are flagged on the device, and the
same kernel runs again for their row blocks around the maximum; without such a row it reads a zero
and returns.

A kept x is an int16 in steps of 2^-9: p is then good to 4e-4, four times finer than the bfloat16
of the dlogits that replace it in the same two bytes.

Every tile has the same shape and order of summation whatever N is, so a row alone gives the same
bits as in a batch. There are no locks, and no atomics but one idempotent flag. H and W are
contiguous. impl="cuda" has statistics_kernel and dlogits_kernel in csrc/ and shares the others;
the two functions that come first here also serve `_row_kernels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# Sums from here on mean that a term, hence the range of a kept x, 2^64, may be exceeded.
OVERFLOW = tl.constexpr(2.0**60)
STEPS = tl.constexpr(512.0)
# Row blocks that share a stripe of W in the L2 cache.
GROUP = tl.constexpr(16)


@triton.jit
def cap(logits, SOFTCAP: tl.constexpr):
    """Return C tanh(logits / C), or the logits as they are if C is 0.

    1 - 2 / (e^2u + 1) cancels near 0, where a series is as good as float32.
    """
    if SOFTCAP > 0:
        u = logits * (1 / SOFTCAP)
        s = u * u
        series = u * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835)))))
        tanh = 1 - 2 / (tl.exp2(u * (2 * LOG2E)) + 1)
        logits = SOFTCAP * tl.where(s < 0.0625, series, tanh)
    return logits


@triton.jit
def row_statistics(target, anchor, total, weighted):
    """Return logprob and entropy, in nats, and log_total of a row.

    In base 2: target and anchor are logits, total = sum 2^(z - anchor), weighted = sum of the same
    terms times (z - anchor). target - anchor is formed first, so that a common offset of all logits
    cancels exactly. A log-prob that comes out a rounding above 0 is set to 0; NaN stays.
    """
    log_total = tl.log2(total)
    logprob = ((target - anchor) - log_total) * LN2
    logprob = tl.where(logprob > 0, 0.0, logprob)
    return logprob, log_total, (log_total - weighted / total) * LN2


@triton.jit
def dlogits_from_logprob(
    logprob2, constant, slope, target, is_target, capped, SOFTCAP: tl.constexpr
):
    """Return dL/d(H W^T) from log2 p, the three numbers of the row and the capped logits."""
    other = tl.exp2(logprob2) * (constant + slope * (logprob2 * LN2))
    if SOFTCAP > 0:
        t = capped * (1 / SOFTCAP)
        other = other * (1 - t * t)
    return tl.where(is_target, target, other)


@triton.jit
def _tile_position(tile, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return the first row and column of a tile: down GROUP row blocks, then to the right."""
    tiles_per_group = GROUP * tl.cdiv(V, BLOCK_V)
    first = tile // tiles_per_group * GROUP
    group_size = tl.minimum(tl.cdiv(N, BLOCK_N) - first, GROUP)
    within = tile % tiles_per_group
    return (first + within % group_size) * BLOCK_N, within // group_size * BLOCK_V


@triton.jit
def _tile_logits(
    hidden,
    weight,
    row,
    column,
    N,
    V,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """Return a [BLOCK_N, BLOCK_V] tile of H W^T, never rounded."""
    logits = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    # Rows and columns beyond the end repeat the last one; what they give is not used.
    rows = tl.minimum(row + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)[:, None]
    columns = tl.minimum(column + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)[:, None]
    for start in range(0, D, BLOCK_D):
        if TMA:
            h = hidden.load([row, start])
            w = weight.load([column, start])
        else:
            d = start + tl.arange(0, BLOCK_D)[None, :]
            h = tl.load(hidden + rows * D + d, mask=d < D, other=0.0)
            w = tl.load(weight + columns * D + d, mask=d < D, other=0.0)
        logits = tl.dot(h, w.T, logits, input_precision="ieee")
    return logits


@triton.jit
def _store_tile(
    out, x, row, column, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, TMA: tl.constexpr
):
    if TMA:
        out.store([row, column], x)
    else:
        rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        columns = column + tl.arange(0, BLOCK_V)[None, :]
        # Rows of `out` are padded to 16 bytes, which TMA asks for.
        position = rows * (tl.cdiv(V, 8) * 8) + columns
        tl.store(out + position, x, mask=(rows < N) & (columns < V))


@triton.jit
def anchor_kernel(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    inv_temperature_ptr,
    target_ptr,
    anchor_ptr,
    D,
    SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the tempered logit of the label as target and as anchor; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    hidden_ptr += row * D
    weight_ptr += tl.load(labels_ptr + row) * D
    products = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        products += h * tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    target = cap(tl.sum(products, 0), SOFTCAP) * (tl.load(inv_temperature_ptr + row) * LOG2E)
    tl.store(target_ptr + row, target)
    tl.store(anchor_ptr + row, target)


@triton.jit
def statistics_kernel(
    hidden,
    weight,
    kept,  # [N, V] int16
    flags_ptr,  # [N + 1]: rows to do; at the end 0 for none, 1 for some, 2 for all
    anchor_ptr,
    inv_temperature_ptr,
    partials_ptr,  # [N, 3, column blocks]: S, M, maximum of x
    N,
    V,
    D,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Partials of every tile, and the kept logits if wanted."""
    num_blocks = tl.cdiv(V, BLOCK_V)
    extent = tl.load(flags_ptr + N)
    num_tiles = tl.cdiv(N, BLOCK_N) * num_blocks * tl.minimum(extent, 1)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=False):
        row, column = _tile_position(tile, N, V, BLOCK_N, BLOCK_V)
        rows = row + tl.arange(0, BLOCK_N)
        mask = rows < N
        is_wanted = extent == 2
        if extent == 1:
            is_wanted = tl.max(tl.load(flags_ptr + rows, mask=mask, other=0), 0) > 0
        if is_wanted:
            logits = _tile_logits(
                hidden, weight, row, column, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D, TMA
            )
            scale = tl.load(inv_temperature_ptr + rows, mask=mask, other=0.0)[:, None] * LOG2E
            anchor = tl.load(anchor_ptr + rows, mask=mask, other=0.0)[:, None]
            columns = column + tl.arange(0, BLOCK_V)[None, :]
            logits = cap(logits, SOFTCAP)
            # A finite stand-in for -inf beyond V: 2^x is 0, and so is x 2^x.
            x = tl.where(columns < V, logits * scale - anchor, -1e30)
            exp = tl.exp2(x)
            partials = partials_ptr + rows.to(tl.int64) * (3 * num_blocks) + column // BLOCK_V
            tl.store(partials, tl.sum(exp, 1), mask=mask)
            tl.store(partials + num_blocks, tl.sum(exp * x, 1), mask=mask)
            tl.store(partials + 2 * num_blocks, tl.max(x, 1), mask=mask)
            if KEEP:
                # Adding 1.5 2^23 rounds to an integer and leaves it in the low bits: no conversion.
                steps = tl.minimum(tl.maximum(x * STEPS, -32768.0), 32767.0) + 12582912.0
                steps = steps.to(tl.int32, bitcast=True).to(tl.int16)
                _store_tile(kept, steps, row, column, N, V, BLOCK_N, BLOCK_V, TMA)


@triton.jit
def reduce_kernel(
    partials_ptr,
    flags_ptr,  # [N + 1]: rows to do
    overflow_ptr,  # [N + 1], written: rows to do again, around the anchor that is left here
    target_ptr,
    anchor_ptr,
    logprobs_ptr,
    log_total_ptr,
    entropy_ptr,
    N,
    num_blocks,
    BLOCK: tl.constexpr,
):
    """Statistics of a row from its partials; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(flags_ptr + row) > 0:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK,), dtype=tl.float32)
        highest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
        for start in range(0, num_blocks, BLOCK):
            block = start + tl.arange(0, BLOCK)
            mask = block < num_blocks
            partials = partials_ptr + row * (3 * num_blocks) + block
            total += tl.load(partials, mask=mask, other=0.0)
            weighted += tl.load(partials + num_blocks, mask=mask, other=0.0)
            x = tl.load(partials + 2 * num_blocks, mask=mask, other=-float("inf"))
            highest = tl.maximum(highest, x)
        anchor = tl.load(anchor_ptr + row)
        total = tl.sum(total, 0)
        logprob, log_total, entropy = row_statistics(
            tl.load(target_ptr + row), anchor, total, tl.sum(weighted, 0)
        )
        tl.store(logprobs_ptr + row, logprob)
        tl.store(log_total_ptr + row, log_total)
        tl.store(entropy_ptr + row, entropy)
        if total >= OVERFLOW:
            tl.store(anchor_ptr + row, anchor + tl.max(highest, 0))
            tl.store(overflow_ptr + row, 1)
            tl.atomic_max(overflow_ptr + N, 1)


@triton.jit
def dlogits_kernel(
    hidden,
    weight,
    out,  # [N, V]
    labels_ptr,
    inv_temperature_ptr,
    anchor_ptr,
    log_total_ptr,
    constant_ptr,
    slope_ptr,
    target_ptr,
    N,
    V,
    D,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """The tile again, and its dlogits, when its statistics and upstream gradient are known."""
    num_tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=False):
        row, column = _tile_position(tile, N, V, BLOCK_N, BLOCK_V)
        logits = _tile_logits(hidden, weight, row, column, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D, TMA)
        rows = row + tl.arange(0, BLOCK_N)
        mask = rows < N
        scale = tl.load(inv_temperature_ptr + rows, mask=mask, other=0.0)[:, None] * LOG2E
        anchor = tl.load(anchor_ptr + rows, mask=mask, other=0.0)[:, None]
        log_total = tl.load(log_total_ptr + rows, mask=mask, other=0.0)[:, None]
        label = tl.load(labels_ptr + rows, mask=mask, other=-1).to(tl.int32)[:, None]
        logits = cap(logits, SOFTCAP)
        d = dlogits_from_logprob(
            (logits * scale - anchor) - log_total,
            tl.load(constant_ptr + rows, mask=mask, other=0.0)[:, None],
            tl.load(slope_ptr + rows, mask=mask, other=0.0)[:, None],
            tl.load(target_ptr + rows, mask=mask, other=0.0)[:, None],
            column + tl.arange(0, BLOCK_V)[None, :] == label,
            logits,
            SOFTCAP,
        )
        d = d.to(out.dtype if TMA else out.dtype.element_ty)
        _store_tile(out, d, row, column, N, V, BLOCK_N, BLOCK_V, TMA)


@triton.jit
def unpack_kernel(
    kept_ptr,
    out_ptr,
    labels_ptr,
    inv_temperature_ptr,
    anchor_ptr,
    log_total_ptr,
    constant_ptr,
    target_ptr,
    V,
    stride_n,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Kept logits to dlogits, element by element, hence in place; grid (rows, column blocks)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = columns < V
    position = row * stride_n + columns
    x = tl.load(kept_ptr + position, mask=mask, other=0).to(tl.float32) / STEPS
    capped = x
    if SOFTCAP > 0:
        capped = (x + tl.load(anchor_ptr + row)) * (LN2 / tl.load(inv_temperature_ptr + row))
    d = dlogits_from_logprob(
        x - tl.load(log_total_ptr + row),
        tl.load(constant_ptr + row),
        0.0,
        tl.load(target_ptr + row),
        columns == tl.load(labels_ptr + row).to(tl.int32),
        capped,
        SOFTCAP,
    )
    tl.store(out_ptr + position, d.to(out_ptr.dtype.element_ty), mask=mask)
