"""Packed attention equals the attention of each sequence by itself, with its gradients."""

import pytest
import torch
from tiny_models import make_model

from laser_fast.model.attention import attention_kwargs, packed_layout, packed_mask, packed_sdpa

CPU = torch.device("cpu")


def naive_attention(query, key, value, lengths, scaling):
    """Softmax attention in float64, one sequence and one head at a time, [T, heads, head_dim]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    outputs, start = [], 0
    for length in lengths:
        q, k, v = (tensor[0, :, start : start + length] for tensor in (query, key, value))
        scores = q @ k.transpose(-1, -2) * scaling
        is_future = torch.ones(length, length, dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(is_future, -torch.inf).softmax(-1) @ v)
        start += length
    return torch.cat(outputs, dim=1).transpose(0, 1)


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
    torch.manual_seed(len(lengths))
    total = sum(lengths)
    shapes = [(1, 4, total, 8), (1, key_value_heads, total, 8), (1, key_value_heads, total, 8)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    layout = packed_layout(lengths, CPU)
    actual = packed_sdpa(*inputs, 0.3, layout)
    expected = naive_attention(*inputs, lengths, 0.3)[None]
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
    )


def test_padding_stays_within_a_factor_of_two():
    lengths = (1, 9, 2, 16, 17, 3, 8, 1, 5, 100)
    layout = packed_layout(lengths, CPU)
    assert sum(index.numel() for index in layout.buckets) <= 2 * sum(lengths)
    assert layout.cu_seqlens.tolist() == torch.tensor((0, *lengths)).cumsum(0).tolist()
    assert layout.max_length == 100


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_a_packed_model_is_the_model_on_each_sequence(family):
    model = make_model(family)
    reference = make_model(family).double()
    model.set_attn_implementation("laser_sdpa")
    sequences = [torch.arange(10, 10 + n) * 7 % 97 for n in (3, 1, 9, 4)]
    lengths = tuple(map(len, sequences))
    packed = model.model(
        input_ids=torch.cat(sequences)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        use_cache=False,
        **attention_kwargs("sdpa", lengths, CPU),
    ).last_hidden_state[0]
    alone = [reference.model(input_ids=ids[None]).last_hidden_state[0] for ids in sequences]
    torch.testing.assert_close(packed.double(), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_without_a_layout_it_is_ordinary_attention():
    model, reference = make_model(), make_model()
    model.set_attn_implementation("laser_sdpa")
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


def test_flash_attention_gets_cumulative_lengths():
    kwargs = attention_kwargs("flash_attention_2", (2, 5), CPU)
    assert kwargs["cu_seq_lens_q"].tolist() == kwargs["cu_seq_lens_k"].tolist() == [0, 2, 7]
    assert kwargs["cu_seq_lens_q"].dtype == torch.int32
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == 5
