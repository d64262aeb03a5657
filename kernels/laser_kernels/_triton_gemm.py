"""How impl="triton" launches the GEMM kernels of `_head_kernels.py`, and their tile sizes.

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


def tile_for(kind: str, hidden_states: Tensor, weight: Tensor) -> Tile:
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


def launch(
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


def block_v(kind: str, hidden_states: Tensor, weight: Tensor) -> int:
    """Return how many columns a partial covers."""
    return tile_for(kind, hidden_states, weight).v


def statistics(
    kind: str,
    hidden_states: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    kept: Tensor | None,  # [n, V] int16, written
    flags: Tensor,  # [n + 1] int32
    anchor: Tensor,  # [n]
    inv_temperature: Tensor,  # [n]
    partials: Tensor,  # [n, 3, column blocks], written
) -> None:
    """Write the partials, and the kept logits if wanted, of the rows that are flagged."""
    tile = tile_for(kind, hidden_states, weight)
    rows = (flags, anchor, inv_temperature, partials)
    keeps = kept is not None
    launch(kernels.statistics_kernel, tile, hidden_states, weight, kept, *rows, KEEP=keeps)


def dlogits(hidden_states: Tensor, weight: Tensor, out: Tensor, *rows: Tensor) -> None:
    """Write dlogits [n, V] from labels, 1/T, logsumexp, constant, slope and target [n]."""
    tile = tile_for("many", hidden_states, weight)
    launch(kernels.dlogits_kernel, tile, hidden_states, weight, out, *rows)
