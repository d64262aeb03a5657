"""Causal attention within packed sequences that may share a prefix, by name in transformers.

A group's prompt is packed once, with its first completion; the others continue it:

    tokens    [prompt r_1 | r_2 | r_3 | prompt' r'_1 | ...]
    r_2 sees  [prompt | r_2], r_3 sees [prompt | r_3], each token what is not to its right

That is exact, also in the gradient, which adds up in the prompt's keys and values (Prefix Grouper,
arXiv 2506.05433). Only keys and values of prefixes are repeated, and no [T, T] mask exists.

"laser_torch" runs torch's scaled_dot_product_attention on any device: segments of similar length
after prefixes of equal length are padded into one batch. "laser_varlen" is
torch.nn.attention.varlen on a GPU, "laser_fa2" the package flash-attn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from laser_fast.config_errors import ConfigError
from laser_fast.records import Segment


@dataclass(frozen=True)
class PackedLayout:
    """Where the segments of a microbatch lie; each table is made for the kernel that asks."""

    segments: tuple[Segment, ...]
    device: torch.device

    @cached_property
    def buckets(self) -> tuple[list[tuple[int, int, int]], Tensor, Tensor, Tensor]:
        """Like segments as batches: their shapes (b, L, S), S = prefix + L, and three indices.

        Queries [sum b L] and keys [sum b S] are places among the T tokens, batch after batch; the
        last index [T] finds each token among the queries. Lengths are within a factor of two; a
        short row is filled up with its own last token, which no earlier token sees.
        """
        members: dict[tuple[int, int], list[int]] = {}
        for index, segment in enumerate(self.segments):
            like = (segment.prefix_length, (segment.length - 1).bit_length())
            members.setdefault(like, []).append(index)
        starts, offset = self._starts(), 0
        shapes, all_queries, all_keys = [], [], []
        inverse = torch.empty(int(starts[-1]), dtype=torch.int64)
        for (prefix_length, _), indices in members.items():
            own = torch.tensor([self.segments[i].length for i in indices])[:, None]
            column = torch.arange(int(own.max()))
            queries = starts[indices][:, None] + torch.minimum(column, own - 1)
            prefix = torch.tensor([self.segments[i].prefix_start for i in indices])[:, None]
            keys = torch.cat([prefix + torch.arange(prefix_length), queries], dim=1)
            place = torch.arange(queries.numel()).view_as(queries) + offset
            inverse[queries[column < own]] = place[column < own]
            offset += queries.numel()
            shapes.append((len(indices), queries.shape[1], keys.shape[1]))
            all_queries.append(queries.flatten())
            all_keys.append(keys.flatten())
        tables = (torch.cat(all_queries), torch.cat(all_keys), inverse)
        queries, keys, inverse = (table.to(self.device) for table in tables)
        return shapes, queries, keys, inverse

    @cached_property
    def keys(self) -> Tensor | None:
        """The places of all keys, by segment; None if they are the tokens as they lie."""
        if not any(segment.prefix_length for segment in self.segments):
            return None
        places = []
        for segment, start in zip(self.segments, self._starts()[:-1].tolist(), strict=True):
            prefix = torch.arange(segment.prefix_length) + segment.prefix_start
            places += [prefix, torch.arange(segment.length) + start]
        return torch.cat(places).to(self.device)

    @cached_property
    def varlen(self) -> tuple[Tensor, Tensor, int, int]:
        """Cumulative lengths of queries and keys, int32 [S + 1], and the largest of each."""
        queries = [segment.length for segment in self.segments]
        keys = [segment.length + segment.prefix_length for segment in self.segments]
        cumulative = (torch.tensor((0, *n)).cumsum(0, dtype=torch.int32) for n in (queries, keys))
        cu_queries, cu_keys = (x.to(self.device) for x in cumulative)
        return cu_queries, cu_keys, max(queries), max(keys)

    def _starts(self) -> Tensor:
        return torch.tensor((0, *(segment.length for segment in self.segments))).cumsum(0)


class Form(NamedTuple):
    """What families differ in: the logits' factor and softcap, and what a token sees."""

    scaling: float | None = None
    window: int = 0  # positions, its own included; 0: all
    softcap: float | None = None


# (query [1, heads, T, head_dim], key [1, key_value_heads, T, head_dim], value, layout, form) ->
# attention of every token to its prefix and its own segment [1, T, heads, head_dim]
Kernel = Callable[[Tensor, Tensor, Tensor, PackedLayout, Form], Tensor]


def packed_sdpa(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, form: Form
) -> Tensor:
    """One call of torch's attention per bucket, which has no softcap: that takes its scores."""
    shapes, queries, keys, inverse = layout.buckets
    # One gather for all buckets: the backward of each fills a gradient of all T tokens.
    all_q = _gather(query, queries).split([b * L for b, L, _ in shapes])
    all_k, all_v = (
        _gather(tensor, keys).split([b * S for b, _, S in shapes]) for tensor in (key, value)
    )
    outputs = []
    for (b, L, S), *rows in zip(shapes, all_q, all_k, all_v, strict=True):
        q, k, v = (tensor.unflatten(0, (b, -1)).transpose(1, 2) for tensor in rows)
        if form.softcap is not None:
            output = _capped_attention(q, k, v, _seen(L, S, form.window, layout.device), form)
        else:
            output = scaled_dot_product_attention(
                *(q, k, v),
                scale=form.scaling,
                enable_gqa=q.shape[1] != k.shape[1],
                **_causal(L, S, form.window, layout.device),
            )
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # [b * L, heads, head_dim]
    return torch.cat(outputs)[inverse][None]


def _causal(num_queries: int, num_keys: int, window: int, device: torch.device) -> dict[str, Any]:
    """How sdpa is told that the last query sees the last key, and each `window` keys at most."""
    if 0 < window < num_keys:
        return {"attn_mask": _seen(num_queries, num_keys, window, device)}
    if num_queries == num_keys:
        return {"is_causal": True}
    return {"attn_mask": causal_lower_right(num_queries, num_keys)}


def _seen(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """The same as a mask [num_queries, num_keys], True where a query sees a key."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    last = num_keys - num_queries
    return seen.tril(last).triu(last - (window or num_keys) + 1)


def _capped_attention(
    q: Tensor,  # [b, heads, L, head_dim]
    k: Tensor,  # [b, key_value_heads, S, head_dim]
    v: Tensor,
    seen: Tensor,  # broadcast to [b, heads, L, S]
    form: Form,
) -> Tensor:
    """Attention by its definition, since torch's has no softcap."""
    assert form.softcap is not None
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    scores = q @ k.transpose(2, 3) * (form.scaling or q.shape[-1] ** -0.5)
    scores = form.softcap * (scores / form.softcap).tanh()
    # A padded prompt's first tokens see nothing: they may read anything, but no NaN.
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~seen, lowest).softmax(
        -1, dtype=torch.promote_types(q.dtype, torch.float32)
    )
    return weights.to(v.dtype) @ v


def packed_varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, form: Form
) -> Tensor:
    """Torch's variable-length flash kernel (half precision, GPU)."""
    from torch.nn.attention.varlen import varlen_attn

    if form.softcap is not None:
        raise ValueError(
            'model.attention = "varlen" has no softcap of attention, which this model uses; set '
            'model.attention = "flash_attention_2", or "sdpa"'
        )
    q, k, v = _gathered(query, key, value, layout)
    # torch 2.11 has no grouped-query option here, so key and value heads are repeated.
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    output = varlen_attn(
        q, k, v, *layout.varlen, scale=form.scaling, window_size=(form.window - 1, 0)
    )
    assert isinstance(output, Tensor)
    return output[None]


def packed_flash(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, form: Form
) -> Tensor:
    """The variable-length kernel of the package flash-attn (half precision, GPU)."""
    from flash_attn import flash_attn_varlen_func

    output = flash_attn_varlen_func(
        *_gathered(query, key, value, layout),
        *layout.varlen,
        softmax_scale=form.scaling,
        causal=True,
        window_size=(form.window - 1, 0),
        softcap=form.softcap or 0.0,
    )
    return output[None]


def _gathered(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as [tokens, heads, head_dim], those of prefixes repeated."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if layout.keys is not None:
        k, v = (_gather(tensor, layout.keys) for tensor in (key, value))
    return q, k, v


def _gather(tensor: Tensor, places: Tensor) -> Tensor:
    """Tokens of [1, heads, T, head_dim] by their places [P], as [P, heads, head_dim].

    Places repeat. The backward of an embedding adds them up in a fixed order, and in float32 on a
    GPU; that of plain indexing does neither with several threads on a CPU, at twice the time.
    """
    tokens = tensor[0].transpose(0, 1)
    return embedding(places, tokens.flatten(1)).unflatten(-1, tokens.shape[1:])


def packed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for packed training input; transformers' sdpa mask for padded generation."""
    return None if kwargs.get("attention_mask") is None else sdpa_mask(*args, **kwargs)


KERNELS = {"sdpa": packed_sdpa, "varlen": packed_varlen, "flash_attention_2": packed_flash}
# transformers looks for a package behind a name that contains "flash", and refuses one with "sdpa"
# for models whose attention has a softcap.
IMPLEMENTATIONS = {
    "sdpa": "laser_torch",
    "varlen": "laser_varlen",
    "flash_attention_2": "laser_fa2",
}


def _register(name: str, kernel: Kernel) -> None:
    """Make a kernel known to transformers; without a layout (generation) it is their sdpa."""
    # Out of the graph of a compiled block, which would be compiled again for every new layout.
    kernel = torch.compiler.disable(kernel)

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        layout: PackedLayout | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if kwargs.get("s_aux") is not None:
            raise ConfigError("model.path: attention sinks are not supported")
        form = Form(scaling, sliding_window or 0, softcap)
        if layout is not None:
            return kernel(query, key, value, layout, form), None
        if softcap is not None:  # which transformers' sdpa would leave out
            seen = attention_mask
            if seen is None:
                seen = _seen(query.shape[2], key.shape[2], form.window, query.device)
            output = _capped_attention(query, key, value, seen, form)
            return output.transpose(1, 2).contiguous(), None
        kwargs |= {"scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, packed_mask)


for _name, _kernel in KERNELS.items():
    _register(IMPLEMENTATIONS[_name], _kernel)


def attention_kwargs(segments: Sequence[Segment], device: torch.device) -> dict[str, Any]:
    """What the model's forward must be given so that packed sequences stay apart."""
    return {"layout": PackedLayout(tuple(segments), device)}
