"""Triton kernels of the head: H W^T with a softmax epilogue that stays in registers.

All exponents are in base 2. With x_iv = z_iv log2(e) - anchor_i, a row needs

    S = sum_v 2^x_v        M = sum_v x_v 2^x_v        and log2 p_v = x_v - log2 S

The anchor is not the maximum but the target's own logit. It is known beforehand, and spares the
epilogue a running maximum and the rescaling that goes with it. S and, if asked for, M and the
maximum of x leave a tile as partials and are reduced later in a fixed order. A target far below the
maximum would overflow: rows with S >= 2^60 (p_y < 1e-18) are flagged on the device, and the same
kernel runs again for their row blocks, once to find the maximum and once around it; without such a
row it reads a zero and returns.

A kept x is an int16 in steps of 2^-9: p is then good to 4e-4, four times finer than the bfloat16
of the dlogits that replace it in the same two bytes. Below -64 it saturates. Above 64 it wraps
around, which is no loss: then S >= 2^60, and the row is done again.

Every tile has the same shape and order of summation whatever N is, but up to 64 rows in last_token,
so a row alone gives the same bits as in a batch. There are no locks, and no atomics but one
idempotent flag. FLATTEN makes one loop of those over tiles and along D, so that the first loads of
the next tile are under way during the epilogue, in the first pass: no `if` may lie between.

H and W are contiguous; rows of kept logits are padded to 16 bytes. impl="cuda" has
statistics_kernel and dlogits_kernel in csrc/ and shares the others; the functions that come first
here also serve `_row_kernels.py`.
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
def cap(logits, inv_temperature, SOFTCAP: tl.constexpr):
    """Return t and scale such that t * scale is the capped and tempered logit in base 2.

    t = tanh(logits / C), or the logits as they are if C is 0. 1 - 2 / (e^2u + 1) cancels near 0,
    where a series is as good as float32.
    """
    scale = inv_temperature * LOG2E
    if SOFTCAP > 0:
        u = logits * (1 / SOFTCAP)
        s = u * u
        series = u * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835)))))
        tanh = 1 - 2 / (tl.exp2(u * (2 * LOG2E)) + 1)
        logits = tl.where(s < 0.0625, series, tanh)
        scale *= SOFTCAP
    return logits, scale


@triton.jit
def padded(V, ALIGN: tl.constexpr):
    """Return the end of a row that is padded to ALIGN elements.

    A mask of V columns would let accesses be no wider than V is aligned: 2 bytes a thread at an odd
    V. What the padding holds is read and overwritten, and of no use to anybody.
    """
    return tl.cdiv(V, ALIGN) * ALIGN


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
def dlogits_from_logprob(logprob2, constant, slope, target, is_target, t, SOFTCAP: tl.constexpr):
    """Return dL/d(H W^T) from log2 p, the three numbers of the row and the t of `cap`."""
    other = tl.exp2(logprob2)
    # In this order Triton 3.6 and 3.9 need at most 255 registers.
    if SOFTCAP > 0:
        other -= other * (t * t)
    if slope is not None:
        constant += slope * logprob2
    other *= constant
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
    hidden, weight, row, column, rows, columns, D, BLOCK_D: tl.constexpr, TMA: tl.constexpr
):
    """Return a tile of H W^T, never rounded: from (row, column) on, or of any rows and columns."""
    logits = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    rows = rows.to(tl.int64)[:, None]
    columns = columns.to(tl.int64)[:, None]
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
        position = rows * padded(V, 8) + columns
        tl.store(out + position, x, mask=(rows < N) & (columns < V))


@triton.jit
def anchor_kernel(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    inv_temperature_ptr,
    target_ptr,
    anchor_ptr,
    overflow_ptr,  # [N + 1], zeroed
    N,
    D,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the tempered logit of the label as target and as anchor; clear the flags.

    A tensor core truncates its sum after every 16 terms, so a logit in a tile is biased, and the
    target has to be biased as it is. So it comes from the diagonal of H_i . W_{y_j}, formed in the
    same order: x_y = 0, but for the rounding of the anchor where a multiply-add is fused.

    All but the diagonal is thrown away: 2 * 64 N D FLOP, 3.8e9 at N = 8192 and D = 3584, 1/2400 of
    the head, and 4 N D bytes, 0.12 GB with labels that differ. A program of few rows takes D/64
    dependent steps, 56.
    """
    block = tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) * BLOCK_N + block
    mask = rows < N
    rows = tl.minimum(rows, N - 1)
    labels = tl.load(labels_ptr + rows)
    logits = _tile_logits(hidden_ptr, weight_ptr, 0, 0, rows, labels, D, BLOCK_D, False)
    diagonal = tl.sum(tl.where(block[:, None] == block[None, :], logits, 0.0), 1)
    t, scale = cap(diagonal, tl.load(inv_temperature_ptr + rows), SOFTCAP)
    target = t * scale
    tl.store(target_ptr + rows, target, mask=mask)
    tl.store(anchor_ptr + rows, target, mask=mask)
    tl.store(overflow_ptr + rows, 0, mask=mask)
    tl.store(overflow_ptr + N, 0)


@triton.jit
def statistics_kernel(
    hidden,
    weight,
    kept,  # [N, V] int16, or None
    flags_ptr,  # [N + 1]: rows to do, and whether there are any; None: all rows
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
    FLATTEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    MAXIMUM: tl.constexpr,
):
    """Partials of every tile, those that are asked for, and the kept logits if wanted."""
    num_blocks = tl.cdiv(V, BLOCK_V)
    num_tiles = tl.cdiv(N, BLOCK_N) * num_blocks
    if flags_ptr is not None:
        num_tiles *= tl.load(flags_ptr + N)
    first, step = tl.program_id(0), tl.num_programs(0)
    for tile in tl.range(first, num_tiles, step, flatten=FLATTEN and flags_ptr is None):
        row, column = _tile_position(tile, N, V, BLOCK_N, BLOCK_V)
        # Rows and columns beyond the end repeat the last one; what they give is not used.
        rows = tl.minimum(row + tl.arange(0, BLOCK_N), N - 1)
        is_wanted = True
        if flags_ptr is not None:
            is_wanted = tl.max(tl.load(flags_ptr + rows), 0) > 0
        if is_wanted:
            repeated = tl.minimum(column + tl.arange(0, BLOCK_V), V - 1)
            logits = _tile_logits(hidden, weight, row, column, rows, repeated, D, BLOCK_D, TMA)
            columns = column + tl.arange(0, BLOCK_V)
            inv_temperature = tl.load(inv_temperature_ptr + rows)[:, None]
            anchor = tl.load(anchor_ptr + rows)[:, None]
            t, scale = cap(logits, inv_temperature, SOFTCAP)
            # A finite stand-in for -inf beyond V: 2^x is 0, and so is x 2^x.
            x = tl.where((columns < V)[None, :], t * scale - anchor, -1e30)
            exp = tl.exp2(x)
            partials = partials_ptr + rows.to(tl.int64) * (3 * num_blocks) + column // BLOCK_V
            mask = row + tl.arange(0, BLOCK_N) < N
            if ENTROPY:
                # Before S: in the other order Triton 3.9 spills.
                tl.store(partials + num_blocks, tl.sum(exp * x, 1), mask=mask)
            tl.store(partials, tl.sum(exp, 1), mask=mask)
            if MAXIMUM:
                tl.store(partials + 2 * num_blocks, tl.max(x, 1), mask=mask)
            if kept is not None:
                # Adding 1.5 2^23 rounds to an integer and leaves it in the low bits: no conversion.
                steps = tl.maximum(x * STEPS, -32768.0) + 12582912.0
                steps = steps.to(tl.int32, bitcast=True).to(tl.int16)
                _store_tile(kept, steps, row, column, N, V, BLOCK_N, BLOCK_V, TMA)


@triton.jit
def reduce_kernel(
    partials_ptr,
    flags_ptr,  # [N + 1]: rows to do; None: all rows
    overflow_ptr,  # [N + 1], written: rows to do again, around the anchor that is left here
    target_ptr,
    anchor_ptr,
    logprobs_ptr,
    log_total_ptr,
    entropy_ptr,  # or None
    N,
    num_blocks,
    MAXIMUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of a row from its partials; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    is_wanted = True
    if flags_ptr is not None:
        is_wanted = tl.load(flags_ptr + row) > 0
    if is_wanted:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK,), dtype=tl.float32)
        highest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
        for start in range(0, num_blocks, BLOCK):
            block = start + tl.arange(0, BLOCK)
            mask = block < num_blocks
            partials = partials_ptr + row * (3 * num_blocks) + block
            total += tl.load(partials, mask=mask, other=0.0)
            if entropy_ptr is not None:
                weighted += tl.load(partials + num_blocks, mask=mask, other=0.0)
            if MAXIMUM:
                x = tl.load(partials + 2 * num_blocks, mask=mask, other=-float("inf"))
                highest = tl.maximum(highest, x)
        anchor = tl.load(anchor_ptr + row)
        total = tl.sum(total, 0)
        logprob, log_total, entropy = row_statistics(
            tl.load(target_ptr + row), anchor, total, tl.sum(weighted, 0)
        )
        tl.store(logprobs_ptr + row, logprob)
        tl.store(log_total_ptr + row, log_total)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, entropy)
        if total >= OVERFLOW:
            if MAXIMUM:
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
    FLATTEN: tl.constexpr,
):
    """The tile again, and its dlogits, when its statistics and upstream gradient are known."""
    num_tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = _tile_position(tile, N, V, BLOCK_N, BLOCK_V)
        # Rows and columns beyond the end repeat the last one; what they give is not used.
        rows = tl.minimum(row + tl.arange(0, BLOCK_N), N - 1)
        repeated = tl.minimum(column + tl.arange(0, BLOCK_V), V - 1)
        logits = _tile_logits(hidden, weight, row, column, rows, repeated, D, BLOCK_D, TMA)
        columns = column + tl.arange(0, BLOCK_V)
        inv_temperature = tl.load(inv_temperature_ptr + rows)[:, None]
        anchor = tl.load(anchor_ptr + rows)[:, None]
        log_total = tl.load(log_total_ptr + rows)[:, None]
        label = tl.load(labels_ptr + rows).to(tl.int32)[:, None]
        t, scale = cap(logits, inv_temperature, SOFTCAP)
        slope = None
        if slope_ptr is not None:
            slope = tl.load(slope_ptr + rows)[:, None] * LN2
        d = dlogits_from_logprob(
            (t * scale - anchor) - log_total,
            tl.load(constant_ptr + rows)[:, None],
            slope,
            tl.load(target_ptr + rows)[:, None],
            columns[None, :] == label,
            t,
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
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Kept logits to dlogits, element by element, hence in place; grid (rows, column blocks)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = columns < padded(V, ALIGN)
    position = row * (stride_n * ALIGN) + columns
    x = tl.load(kept_ptr + position, mask=mask, other=0).to(tl.float32) / STEPS
    t = x
    if SOFTCAP > 0:
        t = (x + tl.load(anchor_ptr + row)) * (LN2 / (tl.load(inv_temperature_ptr + row) * SOFTCAP))
    d = dlogits_from_logprob(
        x - tl.load(log_total_ptr + row),
        tl.load(constant_ptr + row),
        None,
        tl.load(target_ptr + row),
        columns == tl.load(labels_ptr + row).to(tl.int32),
        t,
        SOFTCAP,
    )
    tl.store(out_ptr + position, d.to(out_ptr.dtype.element_ty), mask=mask)
