"""impl="triton" and impl="cuda": everything around a GEMM kernel with a softmax epilogue.

    scoring        writes 12 bytes per row and column block, and nothing of size N V
    keeping        2 bytes a logit, which dlogits then replace in place
    recomputing    2 bytes a logit, dlogits at once

The formulas are in `_head_kernels.py`, whose small kernels serve both. The two differ in who
launches the GEMM kernels: `Fused` below, or `Cuda` in `_extension.py`.

Hopper and data-centre Blackwell load Triton's tiles by TMA descriptor in a persistent grid. Other
devices, and rows that TMA cannot address because they are not 16-byte aligned, use pointers.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _head_kernels as kernels
from ._maths import Head, RowGradient, Statistics, concatenate

# Rows scored at a time: bounds the partials to 156 MB at V = 152k.
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


class Fused:
    """The `_dispatch.Backend` of impl="triton"; impl="cuda" replaces its last three methods."""

    def statistics(self, head: Head, with_entropy: bool = False, few: bool = False) -> Statistics:
        """Score any number of rows and keep nothing; the entropy comes for one FMA a logit."""
        starts = range(0, len(head.hidden_states), SCORE_ROWS)
        chunks = [head.rows(slice(start, start + SCORE_ROWS)) for start in starts]
        return concatenate([self._score(i, None, few) for i in chunks], head.inv_temperature)

    def empty_kept(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        """Return a buffer [n, V] for kept logits, with rows padded to 16 bytes as TMA asks."""
        padded = triton.cdiv(len(weight), 8) * 8
        buffer = hidden_states.new_empty(hidden_states.shape[0], padded, dtype=torch.int16)
        return buffer[:, : len(weight)]

    def keep(
        self, head: Head, few: bool = False, out: Tensor | None = None
    ) -> tuple[Statistics, Tensor]:
        """Score a chunk; return statistics and kept logits [n, V] (`out` if given)."""
        kept = self.empty_kept(head.hidden_states, head.weight) if out is None else out
        return self._score(head, kept, few), kept

    def dlogits_from_kept(
        self, kept: Tensor, head: Head, stats: Statistics, gradient: RowGradient
    ) -> Tensor:
        """Turn kept logits into dlogits [n, V], in place."""
        assert gradient.slope is None  # kept logits serve a loss of log-probs only
        num_rows, num_columns = kept.shape
        dlogits = kept.view(head.hidden_states.dtype)
        rows = (head.labels, head.inv_temperature, stats.anchor, stats.log_total)
        sizes = (gradient.constant, gradient.target, num_columns, kept.stride(0), head.softcap)
        kernels.unpack_kernel[(num_rows, triton.cdiv(num_columns, UNPACK_BLOCK))](
            kept, dlogits, *rows, *sizes, BLOCK_V=UNPACK_BLOCK, num_warps=UNPACK_WARPS
        )
        return dlogits

    def recompute_dlogits(self, head: Head, stats: Statistics, gradient: RowGradient) -> Tensor:
        """Form dlogits [n, V] of rows that were scored."""
        hidden_states, weight, *_ = head
        dlogits = self.empty_kept(hidden_states, weight).view(hidden_states.dtype)
        self.launch_dlogits(head, dlogits, stats.anchor, stats.log_total, *gradient.dense())
        return dlogits

    def _score(self, head: Head, kept: Tensor | None, few: bool) -> Statistics:
        """Score the rows, again around the maximum where the target's logit is too low."""
        hidden_states, weight, labels, inv_temperature, softcap = head
        num_rows, hidden_size = hidden_states.shape
        num_blocks = triton.cdiv(len(weight), self.block_v(head, few))
        target, *stats = (torch.empty_like(inv_temperature) for _ in range(5))
        logprobs, anchor, log_total, entropy = stats
        partials = inv_temperature.new_empty(num_rows, 3, num_blocks)
        all_rows = torch.full((num_rows + 1,), 2, dtype=torch.int32, device=labels.device)
        overflowed = torch.zeros_like(all_rows)
        kernels.anchor_kernel[(num_rows,)](
            *head[:4], target, anchor, hidden_size, softcap, BLOCK_D=VECTOR_BLOCK
        )
        for flags in (all_rows, overflowed):
            self.launch_statistics(head, kept, flags, anchor, partials, few)
            rows = (partials, flags, overflowed, target, anchor, logprobs, log_total, entropy)
            kernels.reduce_kernel[(num_rows,)](*rows, num_rows, num_blocks, BLOCK=VECTOR_BLOCK)
        return Statistics(*stats)

    def block_v(self, head: Head, few: bool) -> int:
        """Return how many columns a partial covers."""
        return tile_for(head, few).v

    def launch_statistics(
        self,
        head: Head,
        kept: Tensor | None,  # [n, V] int16, written
        flags: Tensor,  # [n + 1] int32
        anchor: Tensor,  # [n]
        partials: Tensor,  # [n, 3, column blocks], written
        few: bool,
    ) -> None:
        """Write the partials, and the kept logits if wanted, of the rows that are flagged."""
        rows = (flags, anchor, head.inv_temperature, partials)
        kernel, keeps = kernels.statistics_kernel, kept is not None
        _launch(kernel, tile_for(head, few), head, kept, *rows, KEEP=keeps)

    def launch_dlogits(self, head: Head, out: Tensor, *rows: Tensor) -> None:
        """Write dlogits [n, V] from anchor, log_total, constant, slope and target [n]."""
        tile = tile_for(head, few=False)
        _launch(kernels.dlogits_kernel, tile, head, out, *head[2:4], *rows)


def tile_for(head: Head, few: bool) -> Tile:
    """Return the tile for these operands on their device."""
    operands = head[:2]
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in operands
    )
    if not head.hidden_states.is_cuda:
        return INTERPRETER_TILE._replace(uses_tma=aligned)
    major, _ = torch.cuda.get_device_capability(head.hidden_states.device)
    addressing = "tma" if aligned and major in (9, 10) else "pointer"
    return TILES["few" if few else "many", addressing]


@cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: enough to step over tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    kernel: triton.JITFunction,
    tile: Tile,
    head: Head,
    out: Tensor | None,  # [n, V]
    *rows: Tensor,
    **flags: bool,
) -> None:
    """Launch a kernel over the tiles of [n, V]."""
    hidden_states, weight, *_ = head
    assert hidden_states.is_contiguous() and weight.is_contiguous()

    def operand(x: Tensor | None, *block: int) -> Tensor | TensorDescriptor | None:
        return (
            TensorDescriptor.from_tensor(x, list(block)) if tile.uses_tma and x is not None else x
        )

    num_programs = triton.cdiv(len(hidden_states), tile.n) * triton.cdiv(len(weight), tile.v)
    if tile.uses_tma:
        num_programs = min(num_programs, _num_multiprocessors(hidden_states.device))
    kernel[(num_programs,)](
        operand(hidden_states, tile.n, tile.d),
        operand(weight, tile.v, tile.d),
        operand(out, tile.n, tile.v),
        *rows,
        len(hidden_states),
        *weight.shape,
        SOFTCAP=head.softcap,
        BLOCK_N=tile.n,
        BLOCK_V=tile.v,
        BLOCK_D=tile.d,
        TMA=tile.uses_tma,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **flags,
    )


TRITON = Fused()
