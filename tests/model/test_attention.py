"""Packed attention equals the attention of each sequence by itself, with its gradients."""

import sys
import types

import pytest
import torch
from tiny_models import make_model

from laser_fast.model.attention import (
    IMPLEMENTATIONS,
    Form,
    PackedLayout,
    attention_kwargs,
    packed_flash,
    packed_mask,
    packed_sdpa,
    packed_varlen,
)
from laser_fast.records import Segment

CPU = torch.device("cpu")
GROUPS = [
    (Segment(7), Segment(3, 0, 4), Segment(5, 0, 4)),
    # Two groups, their completions in any order, one prompt as long as its segment.
    (
        Segment(5),
        Segment(9),
        Segment(4, 5, 6),
        Segment(1, 0, 5),
        Segment(6, 5, 6),
        Segment(8, 0, 5),
    ),
]


def naive_attention(query, key, value, segments, scaling, window=None, softcap=None):
    """Softmax attention of one segment at a time, [T, heads, head_dim]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    outputs, start = [], 0
    for length, prefix_start, prefix_length in segments:
        own = range(start, start + length)
        places = [*range(prefix_start, prefix_start + prefix_length), *own]
        q, k, v = query[0, :, list(own)], key[0, :, places], value[0, :, places]
        scores = q @ k.transpose(-1, -2) * scaling
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        distance = torch.arange(prefix_length, len(places))[:, None] - torch.arange(len(places))
        is_unseen = (distance < 0) | (distance >= (window or len(places)))
        outputs.append(scores.masked_fill(is_unseen, -torch.inf).softmax(-1) @ v)
        start += length
    return torch.cat(outputs, dim=1).transpose(0, 1)


def make_inputs(segments, key_value_heads):
    torch.manual_seed(len(segments))
    total = sum(segment.length for segment in segments)
    shapes = [(1, 4, total, 8), (1, key_value_heads, total, 8), (1, key_value_heads, total, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def check(kernel, segments, key_value_heads, **how):
    inputs = make_inputs(segments, key_value_heads)
    layout = PackedLayout(tuple(segments), CPU)
    actual = kernel(*inputs, layout, Form(0.3, **how))
    expected = naive_attention(*inputs, segments, 0.3, **how)[None]
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
    )


@pytest.mark.parametrize(
    "lengths",
    [
        (1,),
        (1, 1, 1),
        (7,),
        (4, 4, 4),  # one full bucket
        (1, 9, 2, 16, 17, 3, 8, 1, 5),  # many buckets, both sides of powers of two
    ],
)
@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
def test_packed_attention_is_attention_within_sequences(lengths, key_value_heads):
    check(packed_sdpa, [Segment(n) for n in lengths], key_value_heads)


@pytest.mark.parametrize("window", [0, 1, 3, 6, 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("segments", GROUPS)
def test_completions_see_their_prompt_and_themselves(segments, softcap, window):
    check(packed_sdpa, segments, 2, window=window, softcap=softcap)


def fake_flash(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap):
    """What flash-attn documents: causal masks are aligned to the bottom right."""
    assert causal and window_size[1] == 0
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert cu_q.dtype == cu_k.dtype == torch.int32
    outputs = []
    for place in range(len(cu_q) - 1):
        own, keys = (slice(cu[place], cu[place + 1]) for cu in (cu_q, cu_k))
        num_prefix = (keys.stop - keys.start) - (own.stop - own.start)
        query = torch.cat([q.new_zeros(int(num_prefix), *q.shape[1:]), q[own]])
        parts = (tensor.transpose(0, 1)[None] for tensor in (query, k[keys], v[keys]))
        window = None if window_size[0] < 0 else window_size[0] + 1
        whole = [Segment(int(keys.stop - keys.start))]
        cap = softcap or None
        outputs.append(naive_attention(*parts, whole, softmax_scale, window, cap)[num_prefix:])
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("segments", [*GROUPS, (Segment(4), Segment(2))])
def test_flash_gets_the_keys_of_every_segment(segments, softcap, window, monkeypatch):
    fake = types.SimpleNamespace(flash_attn_varlen_func=fake_flash)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    check(packed_flash, segments, 2, window=window, softcap=softcap)


@pytest.mark.parametrize("segments", [*GROUPS, (Segment(4), Segment(2))])
def test_varlen_gets_the_keys_of_every_segment(segments, monkeypatch):
    def fake_varlen(q, k, v, *lengths, scale, window_size):
        how = {"softmax_scale": scale, "causal": True, "softcap": 0.0}
        return fake_flash(q, k, v, *lengths, window_size=window_size, **how)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen)
    check(packed_varlen, segments, 2, window=3)


def test_what_a_kernel_cannot_do_is_refused():
    inputs, layout = make_inputs(GROUPS[0], 2), PackedLayout(GROUPS[0], CPU)
    with pytest.raises(ValueError, match='model.attention = "varlen" has no softcap'):
        packed_varlen(*inputs, layout, Form(softcap=2.0))


@pytest.mark.parametrize("name", IMPLEMENTATIONS.values())
def test_transformers_knows_every_kernel(name):
    model = make_model()
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name


def test_gradients_repeat_bit_for_bit_with_several_threads():
    segments = (Segment(264), *(Segment(60, 0, 204) for _ in range(7)))
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 684, 64, requires_grad=True) for _ in range(3)]
    layout = PackedLayout(segments, CPU)
    upstream = torch.randn(1, 684, 4, 64)
    torch.set_num_threads(2)
    try:
        runs = [
            torch.autograd.grad(packed_sdpa(*inputs, layout, Form()), inputs, upstream)
            for _ in range(12)
        ]
    finally:
        torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_padding_stays_within_a_factor_of_two():
    lengths = (1, 9, 2, 16, 17, 3, 8, 1, 5, 100)
    shapes, queries, *_ = PackedLayout(tuple(map(Segment, lengths)), CPU).buckets
    assert sum(b * L for b, L, _ in shapes) == len(queries) <= 2 * sum(lengths)


def test_a_table_is_made_for_the_kernel_that_asks(monkeypatch):
    layout = PackedLayout(GROUPS[0], CPU)
    packed_sdpa(*make_inputs(GROUPS[0], 2), layout, Form())
    assert "buckets" in vars(layout) and not {"keys", "varlen"} & vars(layout).keys()
    assert PackedLayout((Segment(3), Segment(2)), CPU).keys is None


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_a_packed_model_is_the_model_on_each_sequence(family):
    model = make_model(family)
    reference = make_model(family).double()
    model.set_attn_implementation("laser_torch")
    sequences = [torch.arange(10, 10 + n) * 7 % 97 for n in (3, 1, 9, 4)]
    lengths = tuple(map(len, sequences))
    packed = model.model(
        input_ids=torch.cat(sequences)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        use_cache=False,
        **attention_kwargs([Segment(n) for n in lengths], CPU),
    ).last_hidden_state[0]
    alone = [reference.model(input_ids=ids[None]).last_hidden_state[0] for ids in sequences]
    torch.testing.assert_close(packed.double(), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_without_a_layout_it_is_ordinary_attention():
    model, reference = make_model(), make_model()
    model.set_attn_implementation("laser_torch")
    ids = torch.tensor([[2, 2, 11, 12, 13], [21, 22, 23, 24, 25]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    actual = model(ids, attention_mask=mask).logits
    expected = reference(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])
    # The two padded tokens of the first row are not attended to.
    alone = reference(ids[:1, 2:]).logits[0]
    torch.testing.assert_close(actual[0, 2:], alone, rtol=1e-4, atol=1e-5)


def test_packed_input_has_no_mask():
    assert packed_mask(batch_size=1, q_length=4, kv_length=4, attention_mask=None) is None


def test_a_compiled_block_is_not_compiled_again_for_another_layout():
    from torch._dynamo.testing import CompileCounter

    model, counter = make_model(), CompileCounter()
    model.set_attn_implementation(IMPLEMENTATIONS["sdpa"])
    block = torch.compile(model.model.layers[0], backend=counter, dynamic=True)
    counts = []
    for segments in (*GROUPS, *GROUPS[::-1], [Segment(9)], [Segment(4), Segment(6)]):
        total = sum(segment.length for segment in segments)
        hidden_states = torch.randn(1, total, 32)
        rotary = model.model.rotary_emb(hidden_states, torch.arange(total)[None])
        block(hidden_states, position_embeddings=rotary, **attention_kwargs(segments, CPU))
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1]
