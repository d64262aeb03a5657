"""Choice of implementation, workspace size, and what every custom op registration shares."""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._checks import (
    check_head,
    check_label_values,
    check_labels,
    check_temperature_values,
    inverse_temperature,
)

if TYPE_CHECKING:
    from ._fused import Fused

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton", "cuda")
# About 4096 bf16 rows of a 152k vocabulary on a GPU. On a CPU 512 rows of a 32k vocabulary: with
# 256 its GEMMs take 1.07 times as long, with 2048 hardly less.
WORKSPACE_MB = {"cuda": 1300, "cpu": 66}
# What a logit of a chunk takes: float32, or 16 bits where the GEMM kernel itself stores it.
BYTES_PER_LOGIT = {
    ("chunked", "cpu"): 4,
    ("chunked", "cuda"): 4,
    ("triton", "cpu"): 2,
    ("triton", "cuda"): 2,
    ("cuda", "cuda"): 2,
}
# Row chunks are multiples of the tallest GEMM tile.
ROW_MULTIPLE = 128

_last_impl: str | None = None


def last_impl() -> str | None:
    """Return the implementation that the latest call of an op chose, or None before any call."""
    return _last_impl


def choose_impl(op: str, impl: str, hidden_states: Tensor) -> str:
    """Resolve `impl`, remember and log the choice; raise if the named one cannot run here."""
    global _last_impl
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: expected impl to be one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "auto":
        impl = _automatic(hidden_states)
    if impl in ("triton", "cuda"):
        _require_gpu(op, impl, hidden_states)
    if impl == "cuda" and not torch.compiler.is_compiling():
        implementation(impl)  # fails here, before anything is computed; no tracer can follow it
    if impl != _last_impl:
        logger.debug("%s: impl=%s", op, impl)
    _last_impl = impl
    return impl


def _automatic(hidden_states: Tensor) -> str:
    """Triton where its large tiles and TMA are made for the device, else chunked."""
    if not hidden_states.is_cuda or hidden_states.dtype == torch.float32:
        return "chunked"
    major, _ = torch.cuda.get_device_capability(hidden_states.device)
    return "triton" if major in (9, 10) else "chunked"


def _require_gpu(op: str, impl: str, hidden_states: Tensor) -> None:
    interprets = impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not hidden_states.is_cuda and not interprets:
        hint = ", or set TRITON_INTERPRET=1 before the first import to debug on a CPU"
        raise RuntimeError(
            f"{op}: impl={impl!r} needs tensors on an NVIDIA GPU, got {hidden_states.device}; use "
            f"impl='chunked'{hint if impl == 'triton' else ''}"
        )
    if hidden_states.dtype == torch.float32:
        raise ValueError(
            f"{op}: impl={impl!r} expected hidden_states of dtype bfloat16 or float16, got "
            f"{hidden_states.dtype}; use impl='chunked', which takes float32"
        )
    if impl == "cuda":
        capability = torch.cuda.get_device_capability(hidden_states.device)
        if capability != (9, 0):
            raise RuntimeError(
                f"{op}: impl='cuda' is written for Hopper, compute capability 9.0, got "
                f"{capability[0]}.{capability[1]}; use impl='triton', which computes the same"
            )
        hidden_size = hidden_states.shape[1]
        if hidden_size % 8:
            raise ValueError(
                f"{op}: impl='cuda' loads by TMA and expected a hidden size that is a multiple of "
                f"8, got {hidden_size}; use impl='triton', which computes the same"
            )


def implementation(impl: str) -> ModuleType | Fused:
    """Return what offers the public functions of `_chunked.py` in this implementation.

    Triton and the compiled extension are imported here, on first use, and nowhere earlier.
    """
    if impl == "cuda":
        return importlib.import_module("._extension", __package__).load()
    if impl == "triton":
        return importlib.import_module("._fused", __package__).with_triton()
    return importlib.import_module("._chunked", __package__)


def row_chunks(hidden_states: Tensor, weight: Tensor, impl: str) -> list[slice]:
    """Split N rows into equal chunks whose logits fit the workspace.

    LASER_KERNELS_WORKSPACE_MB overrides the default of the device. A chunk has at least 128 rows,
    however small the workspace.
    """
    num_rows, device = len(hidden_states), "cuda" if hidden_states.is_cuda else "cpu"
    megabytes = float(os.environ.get("LASER_KERNELS_WORKSPACE_MB") or WORKSPACE_MB[device])
    limit = int(megabytes * 1e6) // (BYTES_PER_LOGIT[impl, device] * len(weight))
    limit = max(limit // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    num_chunks = max(-(-num_rows // limit), 1)
    step = -(-num_rows // (num_chunks * ROW_MULTIPLE)) * ROW_MULTIPLE
    return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, max(step, 1))]


def check_all(
    op: str,
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    impl: str,
    process_group: ProcessGroup | None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], str, str]:
    """Check all inputs; return dense H, W, labels and 1/T, the implementation, the group's name."""
    check_head(op, hidden_states, weight, allow_float64=impl == "reference")
    check_labels(op, labels, hidden_states)
    inv_temperature = inverse_temperature(op, temperature, hidden_states)
    impl = choose_impl(op, impl, hidden_states)
    if impl == "reference":
        if process_group is not None:
            raise ValueError(
                f"{op}: impl='reference' expected the whole weight and no process_group, got one; "
                f"use another impl, or gather the weight"
            )
        # The ops check values where they run; plain torch has no such place.
        check_label_values(labels, len(weight))
        check_temperature_values(inv_temperature)
    # An op schema can carry the name of a group, not the group.
    group = "" if process_group is None else process_group.group_name
    tensors = (hidden_states, weight, labels, inv_temperature)
    return tuple(x.contiguous() for x in tensors), impl, group


def refuse_double_backward(op: torch.library.CustomOpDef) -> None:
    """Make differentiation of a backward op an error: its gradients are constants to autograd."""

    def backward(ctx: object, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"{op._qualname}: double backward is not supported; differentiate twice with "
            f"impl='reference'"
        )

    op.register_autograd(backward)
