"""What a tensor core makes of a product of 16-bit matrices: it truncates where a CPU rounds."""

import torch
from torch import Tensor

K = 16  # products that are summed before the accumulator is cut to 24 bits


def truncating_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32: each 16 products are added exactly, then the sum goes toward zero."""
    total = torch.zeros(len(a), b.shape[1], dtype=torch.float64)
    for first in range(0, a.shape[1], K):
        block = slice(first, first + K)
        total.addmm_(a[:, block].double(), b[block].double())
        # 29 of float64's 52 bits of mantissa are more than float32 has.
        total.view(torch.int64).bitwise_and_(-(1 << 29))
    return total.float()
