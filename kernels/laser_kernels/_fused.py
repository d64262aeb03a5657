"""impl="triton" and impl="cuda": everything around a GEMM kernel with a softmax epilogue.

    scoring        writes 12 bytes per row and column block: nothing of size N V
    keeping        2 bytes a logit, which dlogits then replace in place
    recomputing    2 bytes a logit, dlogits at once

The two differ in who launches the GEMM kernels, `_triton_gemm.py` or `_extension.py`; the formulas
are in `_head_kernels.py`, whose small kernels serve both.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
import triton
from torch import Tensor

from . import _head_kernels as kernels
from . import _triton_gemm
from ._rows import RowGradient, Statistics, concatenate

# Rows scored at a time: bounds the partials to 156 MB at V = 152k.
SCORE_ROWS = 16384
UNPACK_BLOCK, UNPACK_WARPS = 4096, 8
VECTOR_BLOCK = 1024


class Gemm(Protocol):
    """The launches of `_triton_gemm.py`. `kind` is "many" or "few" rows."""

    def block_v(self, kind: str, hidden_states: Tensor, weight: Tensor) -> int:
        """Return how many columns a partial covers."""

    def statistics(
        self,
        kind: str,
        hidden_states: Tensor,
        weight: Tensor,
        kept: Tensor | None,
        flags: Tensor,
        anchor: Tensor,
        inv_temperature: Tensor,
        partials: Tensor,
    ) -> None:
        """Write the partials, and the kept logits if wanted, of the rows that are flagged."""

    def dlogits(self, hidden_states: Tensor, weight: Tensor, out: Tensor, *rows: Tensor) -> None:
        """Write dlogits [n, V] from labels, 1/T, logsumexp, constant, slope and target [n]."""


class Fused:
    """The functions of `_chunked.py`, on top of the GEMM kernels of one implementation."""

    def __init__(self, gemm: Gemm) -> None:
        self.gemm = gemm

    def statistics(
        self,
        hidden_states: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        labels: Tensor,  # [N]
        inv_temperature: Tensor,  # [N] float32
        with_entropy: bool = False,
    ) -> Statistics:
        """Score any number of rows and keep nothing; the entropy comes for one FMA a logit."""
        return self._statistics("many", hidden_states, weight, labels, inv_temperature)

    def statistics_few(
        self, hidden_states: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor
    ) -> Statistics:
        """Score few rows."""
        return self._statistics("few", hidden_states, weight, labels, inv_temperature)

    @staticmethod
    def empty_kept(hidden_states: Tensor, weight: Tensor) -> Tensor:
        """Return a buffer [n, V] for kept logits, with rows padded to 16 bytes as TMA asks."""
        padded = triton.cdiv(len(weight), 8) * 8
        buffer = hidden_states.new_empty(len(hidden_states), padded, dtype=torch.int16)
        return buffer[:, : len(weight)]

    def keep(
        self, hidden_states: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor
    ) -> tuple[Statistics, Tensor, Tensor]:
        """Score rows; return the statistics, the kept logits [n, V] and their offset [n]."""
        return self._keep("many", hidden_states, weight, labels, inv_temperature)

    def keep_few(
        self, hidden_states: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor
    ) -> tuple[Statistics, Tensor, Tensor]:
        """Score few rows and keep their logits."""
        return self._keep("few", hidden_states, weight, labels, inv_temperature)

    @staticmethod
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
        self,
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
        dlogits = self.empty_kept(hidden_states, weight).view(hidden_states.dtype)
        rows = (labels, inv_temperature, logsumexp, constant, slope, target)
        self.gemm.dlogits(hidden_states, weight, dlogits, *rows)
        return dlogits

    def _score(
        self,
        kind: str,
        hidden_states: Tensor,  # [n, D]
        weight: Tensor,  # [V, D]
        labels: Tensor,  # [n]
        inv_temperature: Tensor,  # [n]
        kept: Tensor | None = None,  # [n, V] int16, written
    ) -> tuple[Statistics, Tensor]:
        """Return the statistics of the rows, and log S, the offset of the kept logits."""
        num_rows, hidden_size = hidden_states.shape
        head = (hidden_states, weight)
        num_blocks = triton.cdiv(len(weight), self.gemm.block_v(kind, *head))
        target, anchor, log_total, *stats = (torch.empty_like(inv_temperature) for _ in range(6))
        partials = inv_temperature.new_empty(num_rows, 3, num_blocks)
        all_rows = torch.full((num_rows + 1,), 2, dtype=torch.int32, device=labels.device)
        overflowed = torch.zeros_like(all_rows)
        kernels.anchor_kernel[(num_rows,)](
            *head, labels, inv_temperature, target, anchor, hidden_size, BLOCK_D=VECTOR_BLOCK
        )
        for flags in (all_rows, overflowed):
            self.gemm.statistics(kind, *head, kept, flags, anchor, inv_temperature, partials)
            rows = (partials, flags, overflowed, target, anchor, *stats, log_total)
            kernels.reduce_kernel[(num_rows,)](*rows, num_rows, num_blocks, BLOCK=VECTOR_BLOCK)
        return Statistics(*stats), log_total

    def _statistics(
        self, kind: str, hidden_states: Tensor, weight: Tensor, *rows: Tensor
    ) -> Statistics:
        starts = range(0, len(hidden_states), SCORE_ROWS)
        chunks = [slice(start, start + SCORE_ROWS) for start in starts]
        parts = [
            self._score(kind, hidden_states[i], weight, *(x[i] for x in rows))[0] for i in chunks
        ]
        return concatenate(parts, like=rows[1])

    def _keep(
        self, kind: str, hidden_states: Tensor, *rest: Tensor
    ) -> tuple[Statistics, Tensor, Tensor]:
        kept = self.empty_kept(hidden_states, rest[0])
        stats, offset = self._score(kind, hidden_states, *rest, kept)
        return stats, kept, offset


@cache
def with_triton() -> Fused:
    """Return what impl="triton" offers."""
    return Fused(_triton_gemm)
