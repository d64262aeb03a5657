"""From a call of a public function to its backend: input checks, choice of `impl`, row chunks.

Every failure of a check says what was expected, what came, and what to do. Shapes, dtypes and
devices are host facts and always checked. Values (labels, temperature) are checked where that costs
no synchronisation: on a CPU always, on a GPU by an asynchronous device assertion when
LASER_KERNELS_DEBUG=1.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._maths import Head, RowGradient, Statistics

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton", "cuda")
# On a GPU 8192 bf16 rows of a 152k vocabulary: most microbatches are one chunk. On a CPU 512 rows
# of a 32k vocabulary: with 256 its GEMMs take 1.07 times as long, with 2048 hardly less.
WORKSPACE_MB = {"cuda": 2600, "cpu": 66}
# What a logit of a chunk takes: float32, or 16 bits where the GEMM kernel itself stores it.
BYTES_PER_LOGIT = {"chunked": 4, "triton": 2, "cuda": 2}
# Row chunks are multiples of the tallest GEMM tile.
ROW_MULTIPLE = 128

_last_impl: str | None = None


class Backend(Protocol):
    """What an implementation offers to the ops: its passes over the vocabulary.

    `load_backend` chooses among `_chunked.py` (the module), `_fused.Fused` and `_extension.Cuda`.
    impl="reference" needs none, because autograd differentiates `reference.py`. How a backend keeps
    logits is its own business, as long as a larger `log_total` means as much smaller log-probs: so
    the shards of a vocabulary learn of the mass of the others.
    """

    def statistics(self, head: Head, with_entropy: bool = False, few: bool = False) -> Statistics:
        """Score any number of rows and keep nothing; `few` rows get tiles made for them."""

    def empty_kept(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        """Return an uninitialised buffer [n, V] like the one that `keep` returns."""

    def keep(
        self, head: Head, few: bool = False, out: Tensor | None = None
    ) -> tuple[Statistics, Tensor]:
        """Score a chunk; return statistics and kept logits [n, V] (`out` if given)."""

    def dlogits_from_kept(
        self, kept: Tensor, head: Head, stats: Statistics, gradient: RowGradient
    ) -> Tensor:
        """Turn kept logits into dlogits [n, V], in the same memory."""

    def recompute_dlogits(self, head: Head, stats: Statistics, gradient: RowGradient) -> Tensor:
        """Form dlogits [n, V] of rows that were scored."""


def load_backend(impl: str) -> Backend:
    """Return a backend; Triton and the extension are imported on first use, and nowhere earlier."""
    if impl == "cuda":
        from . import _extension

        return _extension.load()
    if impl == "triton":
        from . import _fused

        return _fused.TRITON
    from . import _chunked

    return _chunked


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
        load_backend(impl)  # fails here, before anything is computed; no tracer can follow it
    # A tracer can neither log nor be made to trace again whenever another call chose otherwise.
    if not torch.compiler.is_compiling() and impl != _last_impl:
        logger.debug("%s: impl=%s", op, impl)
    _last_impl = impl
    return impl


def _automatic(hidden_states: Tensor) -> str:
    """Triton where its large tiles and TMA are made for the device, else chunked."""
    if not hidden_states.is_cuda or torch.version.hip or hidden_states.dtype == torch.float32:
        return "chunked"
    major, _ = torch.cuda.get_device_capability(hidden_states.device)
    return "triton" if major in (9, 10) else "chunked"


def _require_gpu(op: str, impl: str, hidden_states: Tensor) -> None:
    interprets = impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if (not hidden_states.is_cuda or torch.version.hip) and not interprets:
        hint = ", or set TRITON_INTERPRET=1 before the first import to debug float16 on a CPU"
        raise RuntimeError(
            f"{op}: impl={impl!r} needs tensors on an NVIDIA GPU, got {hidden_states.device}; use "
            f"impl='chunked'{hint if impl == 'triton' else ''}"
        )
    if hidden_states.dtype == torch.float32:
        raise ValueError(
            f"{op}: impl={impl!r} expected hidden_states of dtype bfloat16 or float16, got "
            f"{hidden_states.dtype}; use impl='chunked', which takes float32"
        )
    if not hidden_states.is_cuda and hidden_states.dtype == torch.bfloat16:
        fault = "Triton's interpreter multiplies bfloat16 wrongly (triton-lang/triton#11584)"
        raise ValueError(f"{op}: {fault}; use float16 on a CPU, or impl='chunked'")
    if impl == "cuda":
        major, minor = torch.cuda.get_device_capability(hidden_states.device)
        if (major, minor) != (9, 0):
            raise RuntimeError(
                f"{op}: impl='cuda' is written for Hopper, compute capability 9.0, got "
                f"{major}.{minor}; use impl='triton', which computes the same"
            )
        if hidden_states.shape[1] % 8:
            raise ValueError(
                f"{op}: impl='cuda' loads by TMA and expected a hidden size that is a multiple of "
                f"8, got {hidden_states.shape[1]}; use impl='triton', which computes the same"
            )


def max_chunk_rows(weight: Tensor, impl: str, num_columns: int | None = None) -> int:
    """Return how many rows of logits fit the workspace: a multiple of 128, and at least that.

    LASER_KERNELS_WORKSPACE_MB overrides the default of the device. `num_columns` are those of the
    largest shard of a vocabulary: all ranks split their rows alike, since chunks hold collectives.
    """
    device = "cuda" if weight.is_cuda else "cpu"
    megabytes = float(os.environ.get("LASER_KERNELS_WORKSPACE_MB") or WORKSPACE_MB[device])
    limit = int(megabytes * 1e6) // (BYTES_PER_LOGIT[impl] * (num_columns or len(weight)))
    return max(limit // ROW_MULTIPLE, 1) * ROW_MULTIPLE


def row_chunks(
    hidden_states: Tensor, weight: Tensor, impl: str, num_columns: int | None = None
) -> list[slice]:
    """Split N rows: one chunk if it fits the workspace, else equal ones.

    On a GPU, several chunks take half of the workspace each, and leave the other half to the
    float32 dW that adds them up.
    """
    num_rows, limit = hidden_states.shape[0], max_chunk_rows(weight, impl, num_columns)
    if num_rows <= limit:
        return [slice(0, num_rows)] if num_rows else []
    if weight.is_cuda:
        limit = max(limit // 2 // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    num_chunks = -(-num_rows // limit)
    step = -(-num_rows // (num_chunks * ROW_MULTIPLE)) * ROW_MULTIPLE
    return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]


def check_all(
    op: str,
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    impl: str,
    process_group: ProcessGroup | None,
    reduce_hidden_grad: bool,
) -> tuple[Head, str, str, str]:
    """Check all inputs; return them dense, the implementation, the group, and the group for dH."""
    hidden_states, weight = check_matrices(op, hidden_states, weight, impl)
    _check_rows(op, "labels", labels, hidden_states)
    if labels.dtype != torch.int64:
        raise ValueError(
            f"{op}: expected labels of dtype int64, got {labels.dtype}; use labels.long()"
        )
    inv_temperature = _inverse_temperature(op, temperature, hidden_states)
    softcap = check_softcap(op, softcap)
    impl = choose_impl(op, impl, hidden_states)
    if impl == "reference":
        if process_group is not None:
            raise ValueError(
                f"{op}: impl='reference' expected the whole weight and no process_group, got one; "
                f"use another impl, or gather the weight"
            )
        # The ops check values where they run; plain torch has no such place, a tracer no values.
        if not torch.compiler.is_compiling():
            check_label_values(labels, len(weight))
            check_temperature_values(inv_temperature)
    # An op schema can carry the name of a group, not the group.
    group = "" if process_group is None else process_group.group_name
    dense = [x.contiguous() for x in (hidden_states, weight, labels, inv_temperature)]
    head = Head(dense[0], dense[1], dense[2], dense[3], softcap)
    return head, impl, group, group if reduce_hidden_grad else ""


def check_matrices(
    op: str, hidden_states: Tensor, weight: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    """Check H [N, D] and W [V, D]: one floating dtype, that of an autocast if any; one device."""
    _check_plain_tensor(op, "hidden_states", hidden_states, "[N, D]")
    _check_plain_tensor(op, "weight", weight, "[V, D]")
    hidden_states, weight = _follow_autocast(hidden_states), _follow_autocast(weight)
    named = (("hidden_states", hidden_states, "[N, D]"), ("weight", weight, "[V, D]"))
    for name, x, layout in named:
        if x.dim() != 2:
            raise ValueError(
                f"{op}: expected {name} {layout}, got shape {tuple(x.shape)}; flatten batch "
                f"dimensions and select rows before the call"
            )
        is_supported = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not is_supported and not (impl == "reference" and x.dtype == torch.float64):
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
    return hidden_states, weight


def _follow_autocast(x: Tensor) -> Tensor:
    """Cast to the dtype of an autocast of the tensor's device, as a Linear does with its inputs."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast to ask for
        return x
    is_cast = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if is_cast else x


def check_label_values(labels: Tensor, vocabulary: int | Tensor) -> None:
    """Check that every label lies in [0, V): there is no ignore_index, the caller selects rows."""
    _check_values(
        labels,
        lambda x: (x >= 0) & (x < vocabulary),
        lambda: f"labels: expected values in [0, {vocabulary}); drop ignored rows before the call",
    )


def _inverse_temperature(op: str, temperature: float | Tensor, hidden_states: Tensor) -> Tensor:
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


def check_softcap(op: str, softcap: float | None) -> float:
    """Return the bound of the logits, 0.0 if there is none."""
    if softcap is not None:
        _check_positive(op, "softcap", softcap)
    return float(softcap or 0)


def check_temperature_values(inv_temperature: Tensor) -> None:
    """Check that every temperature is positive and finite."""
    _check_values(
        inv_temperature.reciprocal(),
        lambda x: (x > 0) & x.isfinite(),
        lambda: "temperature: expected values > 0 in every row",
    )


def check_score(op: str, token_id: int, weight: Tensor, beta: float, ref_logprob: float) -> None:
    """Check the reserved token and the two constants of its score."""
    if not isinstance(token_id, int) or not 0 <= token_id < len(weight):
        raise ValueError(
            f"{op}: expected token_id as an int in [0, {len(weight)}), got {token_id!r}; use the "
            f"id that the tokenizer gives to the reserved token"
        )
    _check_positive(op, "beta", beta)
    if isinstance(ref_logprob, str) or not math.isfinite(ref_logprob):
        raise ValueError(f"{op}: expected a finite ref_logprob, got {ref_logprob}; measure it")


def check_targets(op: str, name: str, x: Tensor, hidden_states: Tensor) -> Tensor:
    """Check rewards or weights [B] and return them in float32; no gradient flows into them."""
    _check_rows(op, name, x, hidden_states)
    if x.requires_grad:
        raise ValueError(f"{op}: expected {name} without gradient, got one; pass {name}.detach()")
    return x.float()


def _check_plain_tensor(op: str, name: str, x: object, layout: str) -> None:
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
    if isinstance(value, (str, type(None))) or not 0 < value < math.inf:
        raise ValueError(f"{op}: expected {name} > 0 and finite, got {value!r}; use such a number")


def _check_values(
    values: Tensor, is_valid: Callable[[Tensor], Tensor], message: Callable[[], str]
) -> None:
    if values.device.type == "cpu":
        if not is_valid(values).all():
            raise ValueError(f"{message()}, got {values[~is_valid(values)][0].item()}")
    elif os.environ.get("LASER_KERNELS_DEBUG") == "1":
        torch._assert_async(is_valid(values).all(), message())


def _save_nothing(ctx: object, inputs: tuple, output: object) -> None: ...


def differentiable(
    op: torch.library.CustomOpDef, backward: Callable, setup_context: Callable = _save_nothing
) -> Callable:
    """Register the gradient of an op, and return the op as torch.func takes it, too.

    It asks for a setup_context, which the autograd.Function of torch.library does not have.
    """
    op.register_autograd(backward, setup_context=setup_context)
    functions = dict(forward=lambda *x: op(*x), backward=backward, setup_context=setup_context)
    methods: dict[str, Any] = {name: staticmethod(f) for name, f in functions.items()}
    form: Any = type(op._name, (torch.autograd.Function,), methods | {"generate_vmap_rule": True})

    def call(*args: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return op(*args)
        if torch.compiler.is_compiling():  # Dynamo fails to trace these functions
            torch._dynamo.graph_break(msg="torch.func of laser_kernels needs fullgraph=False")
        return form.apply(*args)

    return call


def refuse_double_backward(op: torch.library.CustomOpDef) -> Callable:
    """Make differentiation of a backward op an error: its gradients are constants to autograd."""

    def backward(ctx: object, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"{op._qualname}: double backward is not supported; differentiate twice with "
            f"impl='reference'"
        )

    return differentiable(op, backward)


def is_last_use(saved: Tensor) -> bool:
    """Whether the running backward may overwrite a tensor that was saved for it.

    Not if the graph is kept or differentiated, nor while it is traced.
    """
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    return type(saved) is Tensor and not keeps_graph and not torch.is_grad_enabled()
