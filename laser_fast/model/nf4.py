"""Frozen linear layers in 4 bits, by bitsandbytes: QLoRA's base weights (arXiv 2305.14314).

    W[i] = nf4[q[i]] a[i // 64]                 q, 4 bits: one of the 16 levels of nf4
    a[j] = levels[s[j]] b[j // 256] + mean a    s, 8 bits; b, 32 bits ("double quantization")

That is 4.127 bits a weight. A forward computes with W in the compute dtype, and so does whoever is
sent the weights; the backward dequantizes it again, instead of keeping it.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laser_fast.config_errors import ConfigError, needs_package

_BLOCK = 64  # weights of one scale
NF4_BYTES = (4 + 8 / _BLOCK + 32 / (_BLOCK * 256)) / 8  # of one weight


class Nf4Linear(nn.Linear):
    """A linear layer that keeps its weight [out, in] in 4 bits, whole on each rank.

    What it keeps are buffers, and none of its state: FSDP2 shards parameters alone. bitsandbytes'
    own Linear4bit has a parameter that FSDP2 would have to ignore, and on some CPUs it rounds what
    it computes to bfloat16.
    """

    packed: Tensor

    def __init__(self, layer: nn.Linear, weight: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.register_parameter("weight", None)
        self.register_parameter("bias", layer.bias)
        packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        self.quant_state = state
        # The very tensors of the state: what rank 0 broadcasts must arrive there.
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", state.absmax, persistent=False)
        self.register_buffer("scales_of_scales", state.state2.absmax, persistent=False)
        self.register_buffer("mean_scale", state.offset, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Like nn.Linear."""
        from bitsandbytes import matmul_4bit

        return matmul_4bit(input, self.packed, self.quant_state, bias=self.bias)

    def dequantized(self) -> Tensor:
        """The weight [out, in] that forwards compute with, in their dtype."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed, self.quant_state)


def quantize_blocks(
    hf: PreTrainedModel, *, dtype: torch.dtype, device: torch.device, is_loaded: bool
) -> None:
    """Put an Nf4Linear on `device` into the place of every frozen linear layer of the blocks.

    A mixture's experts are none. Each weight is rounded to `dtype` first, as transformers' loader
    does; where none are loaded, values are left for a broadcast. A ConfigError says that
    bitsandbytes is missing, or that the blocks of a scale do not divide a layer's rows: on a CPU
    with AVX-512, bitsandbytes 0.50.2 dequantizes such a weight with scales of other blocks.
    """
    with needs_package("bitsandbytes", "model.lora_4bit = true", extra="qlora"):
        import bitsandbytes  # noqa: F401
    for name, layer in list(hf.model.layers.named_modules()):
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
            if layer.in_features % _BLOCK:
                raise ConfigError(
                    f"model.lora_4bit: {name} has {layer.in_features} inputs; expected a multiple "
                    f"of {_BLOCK}; leave model.lora_4bit out for this model"
                )
            if is_loaded:
                weight = layer.weight.data.to(device, dtype)
            else:
                weight = torch.ones(layer.weight.shape, dtype=dtype, device=device)
            hf.model.layers.set_submodule(name, Nf4Linear(layer, weight))
