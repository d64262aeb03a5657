"""Input checks shared by all ops: each failure says expected, got, and what to do.

Shapes, dtypes and devices are host facts and always checked. Values (labels, temperature) are
checked where that costs no synchronisation: on a CPU always, on a GPU by an asynchronous device
assertion when LASER_KERNELS_DEBUG=1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor


def check_head(op: str, hidden_states: Tensor, weight: Tensor, *, allow_float64: bool) -> None:
    """Check the two matrices of the head: [N, D] and [V, D], one floating dtype, one device."""
    for name, x, layout in (
        ("hidden_states", hidden_states, "[N, D]"),
        ("weight", weight, "[V, D]"),
    ):
        _check_plain_tensor(op, name, x, layout)
        if x.dim() != 2:
            raise ValueError(
                f"{op}: expected {name} {layout}, got shape {tuple(x.shape)}; flatten batch "
                f"dimensions and select rows before the call"
            )
        is_supported = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not is_supported and not (allow_float64 and x.dtype == torch.float64):
            raise ValueError(
                f"{op}: expected {name} of dtype float32, bfloat16 or float16, got {x.dtype}; cast "
                f"it, or use impl='reference', which also takes float64"
            )
    if weight.shape[1] != hidden_states.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{op}: expected weight [V, D] with V >= 1 and D={hidden_states.shape[1]} to match "
            f"hidden_states, got {tuple(weight.shape)}; pass it as torch.nn.functional.linear does"
        )
    if weight.dtype != hidden_states.dtype:
        raise ValueError(
            f"{op}: expected weight of the dtype of hidden_states, {hidden_states.dtype}, got "
            f"{weight.dtype}; cast one of them, e.g. hidden_states.to(weight.dtype)"
        )
    _check_device(op, "weight", weight, hidden_states)


def check_labels(op: str, labels: Tensor, hidden_states: Tensor) -> None:
    """Check what the host can see of the labels."""
    _check_rows(op, "labels", labels, hidden_states)
    if labels.dtype != torch.int64:
        raise ValueError(
            f"{op}: expected labels of dtype int64, got {labels.dtype}; use labels.long()"
        )


def check_label_values(labels: Tensor, vocabulary: int) -> None:
    """Check that every label lies in [0, V): there is no ignore_index, the caller selects rows."""
    _check_values(
        labels,
        lambda x: (x >= 0) & (x < vocabulary),
        f"labels: expected values in [0, {vocabulary}); drop ignored rows before the call",
    )


def inverse_temperature(op: str, temperature: float | Tensor, hidden_states: Tensor) -> Tensor:
    """Return 1/T as float32 [N], after checking what the host can see of T."""
    if isinstance(temperature, Tensor):
        _check_rows(op, "temperature", temperature, hidden_states)
        if temperature.dtype != torch.float32 or temperature.requires_grad:
            raise ValueError(
                f"{op}: expected temperature as a float or as float32 [N] without gradient, got "
                f"{temperature.dtype}, requires_grad={temperature.requires_grad}; detach, cast"
            )
        return temperature.reciprocal()
    _check_positive(op, "temperature", temperature)
    return hidden_states.new_full((len(hidden_states),), 1 / temperature, dtype=torch.float32)


def check_temperature_values(inv_temperature: Tensor) -> None:
    """Check that every temperature is positive and finite."""
    _check_values(
        inv_temperature.reciprocal(),
        lambda x: (x > 0) & x.isfinite(),
        "temperature: expected values > 0 in every row",
    )


def check_score(op: str, token_id: int, weight: Tensor, beta: float, ref_logprob: float) -> None:
    """Check the reserved token and the two constants of its score."""
    if not isinstance(token_id, int) or not 0 <= token_id < len(weight):
        raise ValueError(
            f"{op}: expected token_id as an int in [0, {len(weight)}), got {token_id!r}; use the "
            f"id that the tokenizer gives to the reserved token"
        )
    _check_positive(op, "beta", beta)
    if not math.isfinite(ref_logprob):
        raise ValueError(f"{op}: expected a finite ref_logprob, got {ref_logprob}; measure it")


def check_targets(op: str, name: str, x: Tensor, hidden_states: Tensor) -> Tensor:
    """Check rewards or weights [B] and return them in float32; no gradient flows into them."""
    _check_rows(op, name, x, hidden_states)
    if x.requires_grad:
        raise ValueError(f"{op}: expected {name} without gradient, got one; pass {name}.detach()")
    return x.float()


def _check_plain_tensor(op: str, name: str, x: Tensor, layout: str) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: expected {name} as a tensor {layout}, got {type(x).__name__}")
    if type(x).__name__ == "DTensor":
        raise ValueError(
            f"{op}: expected {name} as a plain tensor {layout}, got a DTensor; call the op inside "
            f"the forward of the module that FSDP wraps, where the parameter is unsharded, or pass "
            f"the local shard with process_group="
        )


def _check_rows(op: str, name: str, x: Tensor, hidden_states: Tensor) -> None:
    _check_plain_tensor(op, name, x, "[N]")
    if tuple(x.shape) != (len(hidden_states),):
        raise ValueError(
            f"{op}: expected {name} [N] with N={len(hidden_states)} to match hidden_states, got "
            f"{tuple(x.shape)}; give one value per row"
        )
    _check_device(op, name, x, hidden_states)


def _check_device(op: str, name: str, x: Tensor, hidden_states: Tensor) -> None:
    if x.device != hidden_states.device:
        raise ValueError(
            f"{op}: expected {name} on {hidden_states.device} like hidden_states, got {x.device}; "
            f"move it there"
        )


def _check_positive(op: str, name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(
            f"{op}: expected {name} > 0 and finite, got {value}; use a positive number"
        )


def _check_values(values: Tensor, is_valid: Callable[[Tensor], Tensor], message: str) -> None:
    if values.device.type == "cpu":
        if not is_valid(values).all():
            raise ValueError(f"{message}, got {values[~is_valid(values)][0].item()}")
    elif os.environ.get("LASER_KERNELS_DEBUG") == "1":
        torch._assert_async(is_valid(values).all(), message)
