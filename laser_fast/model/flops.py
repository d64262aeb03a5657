"""FLOP that a training step computes, for the share of a device's peak that it reaches (MFU).

    body       6 B T             B parameters of the blocks, T computed tokens
    head       6 V D N           N rows: one GEMM forward, two backward; 4 of 6 for frozen weights
    attention  12 L W sum pairs  L blocks, W width of queries; pairs of a query and a key it sees

Recomputed forwards do not count, nor those that only read log-probs.
"""

import re
from collections.abc import Iterable

import torch
from torch.nn import Parameter

from laser_fast.model.nf4 import Nf4Linear
from laser_fast.model.policy import Policy
from laser_fast.records import Microbatch

# Dense bfloat16 FLOP/s in the vendor's data sheets, summed in float32, by a part of the device's
# name, or its end: an A10G, a 4090 D and a 4090 of a laptop are others.
PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4$": 121e12,
    "A10$": 125e12,
    "RTX 4090$": 165.2e12,
    "RTX 3090$": 71e12,
}


def training_flop(policy: Policy, batches: Iterable[Microbatch]) -> float:
    """FLOP of a forward and a backward over the microbatches."""
    config = policy.hf.config
    body = sum(
        _flop_per_row(weight)
        * (config.num_experts_per_tok / len(weight) if ".experts." in name else 1)
        for name, weight in policy.hf.model.layers.named_parameters()
    )
    quantized = [m for m in policy.hf.model.layers.modules() if isinstance(m, Nf4Linear)]
    body += sum(4 * layer.in_features * layer.out_features for layer in quantized)
    head = _flop_per_row(policy.hf.lm_head.weight)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    flop = 0.0
    for batch in batches:
        pairs = sum(n * (n + 1) // 2 + n * prefix for n, _, prefix in batch.segments)
        flop += body * len(batch.input_ids) + 12 * config.num_hidden_layers * width * pairs
        flop += head * len(batch.labels)
    return flop


def _flop_per_row(weight: Parameter) -> int:
    return weight.numel() * (6 if weight.requires_grad else 4)


def peak_flops(device: torch.device) -> float | None:
    """The device's peak, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(part, name)), None)
