"""Causal attention within each packed sequence, registered with transformers by name.

"laser_sdpa" runs torch's scaled_dot_product_attention on any device without ever building the
[T, T] block-diagonal mask: sequences of similar length are padded into one batch, so the work is
at most 4 sum(len^2) instead of T^2. "laser_varlen" is torch.nn.attention.varlen on a GPU.
"flash_attention_2" is transformers' own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the sequences of a microbatch lie.

    Each bucket is an index [b, L] into the T packed tokens: one row a sequence, short rows
    filled up with their own last token, which no earlier token sees. `inverse` [T] finds each
    token in the concatenation of all flattened buckets.
    """

    buckets: tuple[Tensor, ...]
    inverse: Tensor
    cu_seqlens: Tensor  # [S + 1] int32
    max_length: int


def packed_layout(lengths: tuple[int, ...], device: torch.device) -> PackedLayout:
    """Sort sequences into buckets of lengths within a factor of two."""
    starts = torch.tensor((0, *lengths)).cumsum(0)
    members: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        members.setdefault((length - 1).bit_length(), []).append(sequence)
    buckets, inverse, offset = [], torch.empty(sum(lengths), dtype=torch.int64), 0
    for sequences in members.values():
        width = max(lengths[s] for s in sequences)
        own = torch.tensor([lengths[s] for s in sequences])[:, None]
        first = starts[torch.tensor(sequences)][:, None]
        column = torch.arange(width)[None, :]
        index = first + torch.minimum(column, own - 1)
        place = torch.arange(index.numel()).view_as(index) + offset
        is_token = column < own
        inverse[index[is_token]] = place[is_token]
        offset += index.numel()
        buckets.append(index.to(device))
    return PackedLayout(
        tuple(buckets), inverse.to(device), starts.to(device, torch.int32), max(lengths)
    )


# (query [1, heads, T, head_dim], key [1, key_value_heads, T, head_dim], value, scaling, layout) ->
# attention of every token to its own sequence [1, T, heads, head_dim]
Kernel = Callable[[Tensor, Tensor, Tensor, float | None, PackedLayout], Tensor]


def packed_sdpa(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: PackedLayout
) -> Tensor:
    """One call of torch's attention per bucket."""
    outputs = []
    for index in layout.buckets:
        q, k, v = (tensor[0, :, index].transpose(0, 1) for tensor in (query, key, value))
        output = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # [b * L, heads, head_dim]
    return torch.cat(outputs)[layout.inverse][None]


def packed_varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: PackedLayout
) -> Tensor:
    """Torch's variable-length flash kernel (half precision, GPU)."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 has no grouped-query option here, so key and value heads are repeated.
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    k, v = (tensor.repeat_interleave(repeats, dim=1) for tensor in (k, v))
    output = varlen_attn(
        q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.max_length, layout.max_length,
        scale=scaling, window_size=(-1, 0),
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output[None]


def packed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for packed training input; transformers' sdpa mask for padded generation."""
    return None if kwargs.get("attention_mask") is None else sdpa_mask(*args, **kwargs)


IMPLEMENTATIONS = {
    "sdpa": "laser_sdpa",
    "varlen": "laser_varlen",
    "flash_attention_2": "flash_attention_2",
}


def _register(name: str, kernel: Kernel) -> None:
    """Make a kernel known to transformers; without a layout (generation) it is their sdpa."""

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        layout: PackedLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if layout is not None:
            return kernel(query, key, value, scaling, layout), None
        inputs = (module, query, key, value, attention_mask)
        return sdpa_attention_forward(*inputs, scaling=scaling, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, packed_mask)


_register(IMPLEMENTATIONS["sdpa"], packed_sdpa)
_register(IMPLEMENTATIONS["varlen"], packed_varlen)


def attention_kwargs(
    implementation: str, lengths: tuple[int, ...], device: torch.device
) -> dict[str, Any]:
    """What the model's forward must be given so that packed sequences stay apart."""
    layout = packed_layout(lengths, device)
    if implementation == "flash_attention_2":
        return {
            "cu_seq_lens_q": layout.cu_seqlens,
            "cu_seq_lens_k": layout.cu_seqlens,
            "max_length_q": layout.max_length,
            "max_length_k": layout.max_length,
        }
    return {"layout": layout}
