"""Input checks shared by all ops: each failure says expected, got, and what to do.

Shapes, dtypes and devices are host facts and always checked. Values (labels, temperature) are
checked where that costs no synchronisation: on the CPU always, on a GPU by an asynchronous device
assertion when LASER_KERNELS_DEBUG=1.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

HALF = (torch.bfloat16, torch.float16)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def check_head(op: str, hidden_states: Tensor, weight: Tensor, *, allow_float64: bool) -> None:
    """Check the two matrices of the head: [N, D] and [V, D], one floating dtype, one device."""
    for name, x, layout in (
        ("hidden_states", hidden_states, "[N, D]"),
        ("weight", weight, "[V, D]"),
    ):
        if not isinstance(x, Tensor):
            raise ValueError(
                f"{op}: expected {name} to be a tensor {layout}, got {type(x).__name__}"
            )
        if type(x).__name__ == "DTensor":
            raise ValueError(
                f"{op}: expected {name} as a plain tensor, got a DTensor with placements "
                f"{x.placements}; call the op inside the forward of the module that FSDP wraps, "
                f"where the parameter is unsharded, or pass the local shard with process_group="
            )
        if x.dim() != 2:
            raise ValueError(
                f"{op}: expected {name} {layout}, got shape {_shape(x)}; flatten or select rows "
                f"before the call"
            )
    if weight.shape[1] != hidden_states.shape[1]:
        raise ValueError(
            f"{op}: expected weight [V, D] with D={hidden_states.shape[1]} to match hidden_states, "
            f"got {_shape(weight)}; pass the head weight as torch.nn.functional.linear takes it"
        )
    if 0 in weight.shape:
        raise ValueError(f"{op}: expected weight [V, D] with V, D >= 1, got {_shape(weight)}")
    supported = (torch.float32, *HALF) + ((torch.float64,) if allow_float64 else ())
    for name, x in (("hidden_states", hidden_states), ("weight", weight)):
        if x.dtype not in supported:
            hint = (
                "cast it, or use impl='reference' or laser_kernels.reference for a float64 oracle"
            )
            raise ValueError(
                f"{op}: expected {name} of dtype float32, bfloat16 or float16, got {x.dtype}; {hint}"
            )
    if weight.dtype != hidden_states.dtype:
        raise ValueError(
            f"{op}: expected weight of the dtype of hidden_states, {hidden_states.dtype}, got "
            f"{weight.dtype}; cast one of them, e.g. hidden_states.to(weight.dtype)"
        )
    check_device(op, "weight", weight, hidden_states.device)


def check_device(op: str, name: str, x: Tensor, device: torch.device) -> None:
    """Check that `x` lives where the hidden states live."""
    if x.device != device:
        raise ValueError(
            f"{op}: expected {name} on {device} like hidden_states, got {x.device}; move it there"
        )


def check_rows(op: str, name: str, x: Tensor, num_rows: int, device: torch.device) -> None:
    """Check a per-row vector: [N] on the device of the hidden states."""
    if tuple(x.shape) != (num_rows,):
        raise ValueError(
            f"{op}: expected {name} [N] with N={num_rows} to match hidden_states, got {_shape(x)}"
        )
    check_device(op, name, x, device)


def check_labels(op: str, labels: Tensor, hidden_states: Tensor) -> None:
    """Check shape, dtype and device of the labels."""
    check_rows(op, "labels", labels, len(hidden_states), hidden_states.device)
    if labels.dtype != torch.int64:
        raise ValueError(
            f"{op}: expected labels of dtype int64, got {labels.dtype}; use labels.long()"
        )


def check_label_values(labels: Tensor, vocabulary: int) -> None:
    """Check that every label lies in [0, V): there is no ignore_index, the caller selects rows."""
    if not _values_are_checked(labels):
        return
    in_range = (labels >= 0) & (labels < vocabulary)
    message = f"labels: expected values in [0, {vocabulary}); drop ignored rows before the call"
    if labels.is_cuda:
        torch._assert_async(in_range.all(), message)
    elif not in_range.all():
        raise ValueError(f"{message}, got {labels[~in_range][0].item()}")


def inverse_temperature(op: str, temperature: float | Tensor, hidden_states: Tensor) -> Tensor:
    """Return 1/T as float32 [N], after checking what the host can see."""
    num_rows, device = len(hidden_states), hidden_states.device
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"{op}: expected temperature > 0, got {temperature}")
        return torch.full((num_rows,), 1 / temperature, dtype=torch.float32, device=device)
    check_rows(op, "temperature", temperature, num_rows, device)
    if temperature.dtype != torch.float32 or temperature.requires_grad:
        raise ValueError(
            f"{op}: expected temperature as a float or a float32 tensor [N] without gradient, "
            f"got {temperature.dtype}, requires_grad={temperature.requires_grad}; detach and cast"
        )
    return temperature.reciprocal()


def check_temperature_values(inv_temperature: Tensor) -> None:
    """Check that every temperature is positive and finite."""
    if not _values_are_checked(inv_temperature):
        return
    is_valid = (inv_temperature > 0) & inv_temperature.isfinite()
    message = "temperature: expected values > 0 in every row"
    if inv_temperature.is_cuda:
        torch._assert_async(is_valid.all(), message)
    elif not is_valid.all():
        raise ValueError(f"{message}, got {1 / inv_temperature[~is_valid][0].item()}")


def check_token_id(op: str, token_id: int, weight: Tensor) -> None:
    """Check the reserved token."""
    if not isinstance(token_id, int) or not 0 <= token_id < len(weight):
        raise ValueError(
            f"{op}: expected token_id as an int in [0, {len(weight)}), got {token_id!r}"
        )


def check_score_constants(op: str, beta: float, ref_logprob: float) -> None:
    """Check the two constants of the score."""
    if not 0 < beta < float("inf"):
        raise ValueError(f"{op}: expected beta > 0, got {beta}")
    if not -float("inf") < ref_logprob < float("inf"):
        raise ValueError(f"{op}: expected a finite ref_logprob, got {ref_logprob}")


def check_constants_of_rows(op: str, name: str, x: Tensor, hidden_states: Tensor) -> Tensor:
    """Check rewards or weights [B], return them in float32; no gradient flows into them."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: expected {name} to be a tensor [B], got {type(x).__name__}")
    check_rows(op, name, x, len(hidden_states), hidden_states.device)
    if x.requires_grad:
        raise ValueError(f"{op}: expected {name} without gradient; pass {name}.detach()")
    return x.float()


def group_name(op: str, process_group: ProcessGroup | None, impl: str) -> str:
    """Return the name by which an op schema can carry the group; empty for none."""
    if process_group is None:
        return ""
    if impl == "reference":
        raise ValueError(
            f"{op}: expected impl other than 'reference' with process_group=, got both; the "
            f"reference takes the whole weight"
        )
    return process_group.group_name


def _values_are_checked(x: Tensor) -> bool:
    return x.device.type == "cpu" or os.environ.get("LASER_KERNELS_DEBUG") == "1"
