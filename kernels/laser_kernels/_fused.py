"""impl="triton" and impl="cuda": everything around a GEMM kernel with a softmax epilogue.

    scoring        writes 4 to 12 bytes per row and column block, and nothing of size N V
    keeping        2 bytes a logit, which dlogits then replace in place
    recomputing    2 bytes a logit, dlogits at once

The formulas are in `_head_kernels.py`, whose small kernels serve both. The two differ in who
launches the GEMM kernels: `Fused` below, or `Cuda` in `_extension.py`.

Hopper and data-centre Blackwell load Triton's tiles by TMA descriptor in a persistent grid. Other
devices, and rows that TMA cannot address because they are not 16-byte aligned, use pointers.
"""

from __future__ import annotations

import math
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
    score_stages: int  # where no tile is stored
    uses_tma: bool
    flattens: bool = False  # on Hopper; on Blackwell Triton 3.9 would spill up to 280 bytes


# The largest tiles that need no spills and whose shared memory, 2 (n + v) d bytes a stage and 2 n v
# to stage the tile that is stored, fits: 227 KB with TMA, 99 KB elsewhere. "few" rows are short on
# work and long on traffic: narrow tiles give every multiprocessor a share of W, in deep pipelines.
# A score of many rows stores no tile, and has its memory, 64 KB, for a stage of 48 KB.
TILES = {
    ("many", "tma"): Tile(128, 256, 64, 8, num_stages=3, score_stages=4, uses_tma=True),
    ("many", "pointer"): Tile(128, 128, 32, 8, num_stages=4, score_stages=4, uses_tma=False),
    ("few", "tma"): Tile(64, 128, 64, 4, num_stages=6, score_stages=6, uses_tma=True),
    ("few", "pointer"): Tile(64, 128, 32, 4, num_stages=4, score_stages=4, uses_tma=False),
}
# One block of "few" rows. Two would read W twice from the L2 cache, which then sets the time: 24 KB
# for a step of 64 x 128 x 64 are twice the bytes a FLOP of "many", 48 KB for 128 x 256 x 64.
MAX_FEW_ROWS = 64
# Rows of the anchor kernel: the fewest for which Hopper has a warp-group instruction, as the tiles
# use. Seven stages of 16 KB in flight, because a step waits for memory and for nothing else.
ANCHOR_ROWS, ANCHOR_WARPS, ANCHOR_STAGES = 64, 4, 7
# The interpreter steps through every tile on the CPU: tiny ones, of both kinds of addressing.
INTERPRETER_TILE = Tile(16, 32, 16, 1, num_stages=1, score_stages=1, uses_tma=True)


class Fused:
    """The `_dispatch.Backend` of impl="triton"; impl="cuda" replaces its last four methods."""

    def statistics(self, head: Head, with_entropy: bool = False, few: bool = False) -> Statistics:
        """Score any number of rows and keep nothing; the entropy costs one FMA a logit."""
        starts = range(0, len(head.hidden_states), SCORE_ROWS)
        chunks = [head.rows(slice(start, start + SCORE_ROWS)) for start in starts]
        parts = [self._score(chunk, None, few, with_entropy) for chunk in chunks]
        # Joining a single part would copy it, by a launch for each of its tensors.
        return parts[0] if len(parts) == 1 else concatenate(parts, head.inv_temperature)

    def empty_kept(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        """Return a buffer [n, V] for kept logits, with rows padded to 16 bytes as TMA asks."""
        return empty_rows(hidden_states, weight, torch.int16)

    def keep(
        self, head: Head, few: bool = False, out: Tensor | None = None
    ) -> tuple[Statistics, Tensor]:
        """Score a chunk; return statistics and kept logits [n, V] (`out` if given)."""
        kept = self.empty_kept(head.hidden_states, head.weight) if out is None else out
        return self._score(head, kept, few, with_entropy=False), kept

    def dlogits_from_kept(
        self, kept: Tensor, head: Head, stats: Statistics, gradient: RowGradient
    ) -> Tensor:
        """Turn kept logits into dlogits [n, V], in place."""
        assert gradient.slope is None  # kept logits serve a loss of log-probs only
        num_rows, num_columns = kept.shape
        dlogits = kept.view(head.hidden_states.dtype)
        align, stride = row_alignment(kept)
        rows = (head.labels, head.inv_temperature, stats.anchor, stats.log_total)
        sizes = (num_columns, stride, head.softcap, align, UNPACK_BLOCK)
        arguments = (kept, dlogits, *rows, gradient.constant, gradient.target, *sizes)
        grid = (num_rows, triton.cdiv(num_columns, UNPACK_BLOCK))
        launch(kernels.unpack_kernel, grid, kept, *arguments, num_warps=UNPACK_WARPS)
        return dlogits

    def recompute_dlogits(self, head: Head, stats: Statistics, gradient: RowGradient) -> Tensor:
        """Form dlogits [n, V] of rows that were scored."""
        hidden_states, weight, *_ = head
        dlogits = self.empty_kept(hidden_states, weight).view(hidden_states.dtype)
        self.launch_dlogits(head, dlogits, stats.anchor, stats.log_total, *gradient)
        return dlogits

    def _score(self, head: Head, kept: Tensor | None, few: bool, with_entropy: bool) -> Statistics:
        """Score the rows, again around the maximum where the target's logit is too low.

        The first pass learns the maximum only where that is free, with few rows, whose time is
        that of reading W. With many, another pass finds it. Passes after the first return at once
        if no row is flagged.
        """
        few = self.is_few(head, few)
        num_blocks = triton.cdiv(len(head.weight), self.block_v(head, few))
        target, logprobs, anchor, log_total = (
            torch.empty_like(head.inv_temperature) for _ in range(4)
        )
        entropy = target.new_empty(len(target) if with_entropy else 0)
        partials = target.new_empty(len(target), 3, num_blocks)
        overflowed = target.new_empty(len(target) + 1, dtype=torch.int32)
        self._launch_anchor(head, few, target, anchor, overflowed)
        for flags in (None, overflowed) if few else (None, overflowed, overflowed):
            asked = dict(with_entropy=with_entropy, with_maximum=few or flags is not None)
            self.launch_statistics(head, kept, flags, anchor, partials, few, **asked)
            rows = (target, anchor, logprobs, log_total, entropy if with_entropy else None)
            sizes = (len(target), num_blocks, asked["with_maximum"], VECTOR_BLOCK)
            arguments = (partials, flags, overflowed, *rows, *sizes)
            launch(kernels.reduce_kernel, (len(target),), target, *arguments)
        return Statistics(logprobs, anchor, log_total, entropy)

    def _launch_anchor(self, head: Head, few: bool, *out: Tensor) -> None:
        hidden_states, _, _, _, softcap = head
        num_rows, hidden_size = hidden_states.shape
        sizes = (num_rows, hidden_size, softcap, ANCHOR_ROWS, tile_for(head, few).d)
        options = dict(num_warps=ANCHOR_WARPS, num_stages=ANCHOR_STAGES)
        grid = (triton.cdiv(num_rows, ANCHOR_ROWS),)
        launch(kernels.anchor_kernel, grid, hidden_states, *head[:4], *out, *sizes, **options)

    def is_few(self, head: Head, few: bool) -> bool:
        """Return whether rows that the caller calls few are few enough for the tile."""
        return few and len(head.hidden_states) <= MAX_FEW_ROWS

    def block_v(self, head: Head, few: bool) -> int:
        """Return how many columns a partial covers."""
        return tile_for(head, few).v

    def launch_statistics(
        self,
        head: Head,
        kept: Tensor | None,  # [n, V] int16, written
        flags: Tensor | None,  # [n + 1] int32; None: all rows
        anchor: Tensor,  # [n]
        partials: Tensor,  # [n, 3, column blocks]; written: S and, if asked for, M and the maximum
        few: bool,
        with_entropy: bool,
        with_maximum: bool,
    ) -> None:
        """Write the partials, and the kept logits if wanted, of the rows that are flagged."""
        tile = tile_for(head, few)
        num_stages = tile.score_stages if kept is None else tile.num_stages
        rows = (flags, anchor, head.inv_temperature, partials)
        asked = dict(ENTROPY=with_entropy, MAXIMUM=with_maximum)
        _launch(kernels.statistics_kernel, tile, num_stages, head, kept, *rows, **asked)

    def launch_dlogits(self, head: Head, out: Tensor, *rows: Tensor | None) -> None:
        """Write dlogits [n, V] from anchor, log_total, constant, slope and target [n]."""
        tile = tile_for(head, few=False)
        _launch(kernels.dlogits_kernel, tile, tile.num_stages, head, out, *head[2:4], *rows)


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
    tile = TILES["few" if few else "many", addressing]
    return tile._replace(flattens=tile.uses_tma and major == 9)


def empty_rows(hidden_states: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised [n, V] whose rows are padded to 8 elements: to 16 bytes and more."""
    num_columns = weight.shape[0]
    padded = triton.cdiv(num_columns, 8) * 8
    return hidden_states.new_empty(hidden_states.shape[0], padded, dtype=dtype)[:, :num_columns]


def row_alignment(x: Tensor) -> tuple[int, int]:
    """Return how many elements, at most 8, rows are aligned to, and their distance in that unit.

    A compiler that sees only an odd V and a stride must assume that rows start anywhere. Nothing
    beyond V is aligned that is not there: a clone of one row has its stride, and not its padding.
    """
    stride = x.stride(0)
    end = (x.storage_offset() + len(x) * stride) * x.element_size()
    is_padded = end <= x.untyped_storage().nbytes()
    align = math.gcd(8, stride, 0 if is_padded else x.shape[1])
    return align, stride // align


def launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], on: Tensor, *args: object, **options: int
) -> None:
    """Launch a kernel on the device of a tensor, which need not be the current one.

    z scale - anchor is one fused multiply-add. Triton 3.10 is to fuse only where it is asked to.
    """
    with torch.cuda.device_of(on):
        kernel[grid](*args, enable_fp_fusion=True, **options)


@cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: enough to step over tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    kernel: triton.JITFunction,
    tile: Tile,
    num_stages: int,
    head: Head,
    out: Tensor | None,  # [n, V]
    *rows: Tensor | None,
    **asked: bool,
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
    launch(
        kernel,
        (num_programs,),
        hidden_states,
        operand(hidden_states, tile.n, tile.d),
        operand(weight, tile.v, tile.d),
        operand(out, tile.n, tile.v),
        *rows,
        len(hidden_states),
        *weight.shape,
        head.softcap,
        tile.n,
        tile.v,
        tile.d,
        tile.uses_tma,
        tile.flattens,
        num_warps=tile.num_warps,
        num_stages=num_stages,
        **asked,
    )


TRITON = Fused()
