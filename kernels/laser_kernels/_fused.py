"""impl="triton": launches of the kernels in `_head_kernels.py`, and their tile sizes.

    scoring        writes 12 bytes per row and column block: nothing of size N V
    keeping        2 bytes a logit, which dlogits then replace in place
    recomputing    2 bytes a logit, dlogits at once

Hopper and data-centre Blackwell load tiles by TMA descriptor in a persistent grid. Other devices,
and rows that TMA cannot address because they are not 16-byte aligned, use pointers.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _head_kernels as kernels
from ._rows import RowGradient, Statistics, concatenate

# Rows scored at a time: bounds the partials to 120 MB at V = 152k.
SCORE_ROWS = 16384
UNPACK_BLOCK, UNPACK_WARPS = 4096, 8
VECTOR_BLOCK = 1024


class Tile(NamedTuple):
    """Tile sizes and launch shape of the GEMM kernels."""

    n: int
    v: int
    d: int
    num_warps: int
    num_stages: int
    uses_tma: bool


# The largest tiles that need no spills and whose shared memory, 2 (n + v) d bytes a stage and 2 n v
# to stage the tile that is stored, fits: 227 KB with TMA, 99 KB elsewhere. "few" rows are short on
# work and long on traffic: narrow tiles give every multiprocessor a share of W, in deep pipelines.
TILES = {
    ("many", "tma"): Tile(128, 256, 64, num_warps=8, num_stages=3, uses_tma=True),
    ("many", "pointer"): Tile(128, 128, 32, num_warps=8, num_stages=4, uses_tma=False),
    ("few", "tma"): Tile(64, 128, 64, num_warps=4, num_stages=6, uses_tma=True),
    ("few", "pointer"): Tile(64, 128, 32, num_warps=4, num_stages=4, uses_tma=False),
}
# The interpreter steps through every tile on the CPU: tiny ones, of both kinds of addressing.
INTERPRETER_TILE = Tile(16, 32, 16, num_warps=1, num_stages=1, uses_tma=True)


def _tile(kind: str, hidden_states: Tensor, weight: Tensor) -> Tile:
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
        for x in (hidden_states, weight)
    )
    if not hidden_states.is_cuda:
        return INTERPRETER_TILE._replace(uses_tma=aligned)
    major, _ = torch.cuda.get_device_capability(hidden_states.device)
    return TILES[kind, "tma" if aligned and major in (9, 10) else "pointer"]


@cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: enough to step over tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    kernel: triton.JITFunction,
    tile: Tile,
    hidden_states: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    out: Tensor | None,  # [n, V]
    *rows: Tensor,
    **flags: bool,
) -> None:
    """Launch a kernel over the tiles of [n, V]."""
    assert hidden_states.is_contiguous() and weight.is_contiguous()

    def operand(x: Tensor | None, *block: int) -> Tensor | TensorDescriptor | None:
        return (
            TensorDescriptor.from_tensor(x, list(block)) if tile.uses_tma and x is not None else x
        )

    num_tiles = triton.cdiv(len(hidden_states), tile.n) * triton.cdiv(len(weight), tile.v)
    num_programs = num_tiles
    if tile.uses_tma:
        num_programs = min(num_tiles, _num_multiprocessors(hidden_states.device))
    kernel[(num_programs,)](
        operand(hidden_states, tile.n, tile.d),
        operand(weight, tile.v, tile.d),
        operand(out, tile.n, tile.v),
        *rows,
        len(hidden_states),
        *weight.shape,
        BLOCK_N=tile.n,
        BLOCK_V=tile.v,
        BLOCK_D=tile.d,
        TMA=tile.uses_tma,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **flags,
    )


def _score(
    kind: str,
    hidden_states: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [n]
    inv_temperature: Tensor,  # [n]
    kept: Tensor | None = None,  # [n, V] int16, written
) -> tuple[Statistics, Tensor]:
    """Return the statistics of the rows, and log S, the offset of the kept logits."""
    num_rows, hidden_size = hidden_states.shape
    tile = _tile(kind, hidden_states, weight)
    num_blocks = triton.cdiv(len(weight), tile.v)
    target, anchor, log_total, *stats = (torch.empty_like(inv_temperature) for _ in range(6))
    partials = inv_temperature.new_empty(num_rows, 3, num_blocks)
    all_rows = torch.full((num_rows + 1,), 2, dtype=torch.int32, device=labels.device)
    overflowed = torch.zeros_like(all_rows)
    head = (hidden_states, weight)
    kernels.anchor_kernel[(num_rows,)](
        *head, labels, inv_temperature, target, anchor, hidden_size, BLOCK_D=VECTOR_BLOCK
    )
    for flags in (all_rows, overflowed):
        rows = (flags, anchor, inv_temperature, partials)
        _launch(kernels.statistics_kernel, tile, *head, kept, *rows, KEEP=kept is not None)
        rows = (partials, flags, overflowed, target, anchor, *stats, log_total)
        kernels.reduce_kernel[(num_rows,)](*rows, num_rows, num_blocks, BLOCK=VECTOR_BLOCK)
    return Statistics(*stats), log_total


def _statistics(kind: str, hidden_states: Tensor, weight: Tensor, *rows: Tensor) -> Statistics:
    starts = range(0, len(hidden_states), SCORE_ROWS)
    chunks = [slice(start, start + SCORE_ROWS) for start in starts]
    parts = [_score(kind, hidden_states[i], weight, *(x[i] for x in rows))[0] for i in chunks]
    return concatenate(parts, like=rows[1])


def _keep(kind: str, hidden_states: Tensor, *rest: Tensor) -> tuple[Statistics, Tensor, Tensor]:
    kept = empty_kept(hidden_states, rest[0])
    stats, offset = _score(kind, hidden_states, *rest, kept)
    return stats, kept, offset


# ------------------------------------------------------------------ the same as in `_chunked.py`


def statistics(
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    inv_temperature: Tensor,  # [N] float32
    with_entropy: bool = False,
) -> Statistics:
    """Score any number of rows and keep nothing; the entropy comes for one FMA a logit."""
    return _statistics("many", hidden_states, weight, labels, inv_temperature)


def statistics_few(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor
) -> Statistics:
    """Score few rows."""
    return _statistics("few", hidden_states, weight, labels, inv_temperature)


def empty_kept(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Return a buffer [n, V] for kept logits, with rows padded to 16 bytes as the kernels do."""
    padded = triton.cdiv(len(weight), 8) * 8
    buffer = hidden_states.new_empty(len(hidden_states), padded, dtype=torch.int16)
    return buffer[:, : len(weight)]


def keep(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor
) -> tuple[Statistics, Tensor, Tensor]:
    """Score rows; return the statistics, the kept logits [n, V] and their offset [n]."""
    return _keep("many", hidden_states, weight, labels, inv_temperature)


def keep_few(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor
) -> tuple[Statistics, Tensor, Tensor]:
    """Score few rows and keep their logits."""
    return _keep("few", hidden_states, weight, labels, inv_temperature)


def dlogits_from_kept(
    kept: Tensor,  # [n, V] int16, overwritten
    offset: Tensor,  # [n]
    labels: Tensor,  # [n]; -1: the target is in another shard
    inv_temperature: Tensor,  # [n]
    gradient: RowGradient,
    dtype: torch.dtype,
) -> Tensor:
    """Turn kept logits into dlogits [n, V], in place."""
    assert gradient.slope is None  # kept logits serve a loss of log-probs alone
    num_rows, num_columns = kept.shape
    dlogits = kept.view(dtype)
    rows = (labels, offset, gradient.constant, gradient.target)
    sizes = (num_columns, kept.stride(0))
    kernels.unpack_kernel[(num_rows, triton.cdiv(num_columns, UNPACK_BLOCK))](
        kept, dlogits, *rows, *sizes, BLOCK_V=UNPACK_BLOCK, num_warps=UNPACK_WARPS
    )
    return dlogits


def recompute_dlogits(
    hidden_states: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [n]; -1: the target is in another shard
    inv_temperature: Tensor,  # [n]
    logsumexp: Tensor,  # [n]
    gradient: RowGradient,
) -> Tensor:
    """Form dlogits [n, V] of rows whose logsumexp is known."""
    constant, slope, target = gradient
    slope = torch.zeros_like(constant) if slope is None else slope
    dlogits = empty_kept(hidden_states, weight).view(hidden_states.dtype)
    rows = (labels, inv_temperature, logsumexp, constant, slope, target)
    tile = _tile("many", hidden_states, weight)
    _launch(kernels.dlogits_kernel, tile, hidden_states, weight, dlogits, *rows)
    return dlogits
