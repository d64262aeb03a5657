"""A row-separable loss of log-probabilities with its gradients formed in the forward: 3 GEMMs.

    H [N, D], W [V, D], labels, T
      |  checks, backend, chunks of rows        _dispatch.py
      v
    logits, kept; logprobs [n]      GEMM 1      _chunked.py   <- _maths.py, _row_kernels.py
      |                                         or _fused.py  <- _head_kernels.py
      |                                         or _extension.py <- csrc/linear_logprob.cu
      |  shards of the vocabulary               _vocab_parallel.py
      v
    g = dL/dlogprob [n]                         the caller's loss_fn, on a leaf of n floats
      |  three numbers a row                    _maths.py
      v
    dZ [n, V], in place of the logits           the same backend
      |  dH = dZ W, dW += dZ^T H   GEMMs 2, 3   linear_logprob.py <- _maths.py
      v
    loss, dH, dW                                this file
      |  backward: times the upstream scalar
      v
    gradients of H and W

Symbols as in `reference.py`. The scale of g goes into dZ before its one rounding: scaling H instead
would save a pass over the chunk, and round twice, which costs dW 1.2 times the error.

If all rows are one chunk, a GPU's GEMM writes dW in bfloat16: no float32 dW, no sum over chunks, no
pass of the backward. An upstream scalar other than a power of two then rounds dW a
second time, 1.5 times the error of its rounding. Several chunks add up in float32 and round once,
after that scalar; so does dH always, and dW on a CPU, whose GEMMs give float32 anyway.

Memory beyond inputs and gradients, with C = LASER_KERNELS_WORKSPACE_MB (2600 MB on a GPU):

    one chunk       C + 4 N D             V = 152064, D = 3584, bf16:  N = 8192    2.6 GB (2.4 GiB)
    several         C/2 + 4 V D + 4 N D                                N = 32768   4.0 GB (3.7 GiB)

A schema cannot carry `loss_fn`, so the public function is Python over ops. Compiled, a loop over
chunks would be unrolled for every N: rows beyond one chunk, or of a number that only the data know,
and heads in shards go through `linear_logprob` instead, with 4 GEMMs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _chunked, reference
from ._dispatch import (
    check_all,
    check_label_values,
    check_temperature_values,
    differentiable,
    is_last_use,
    load_backend,
    max_chunk_rows,
    refuse_double_backward,
    row_chunks,
)
from ._maths import Head, Statistics, empty_weight_gradient, factor_out_exponent, row_gradient
from ._ops import add_op_namespace_prefix
from ._vocab_parallel import combine, largest_shard, localize
from .linear_logprob import apply_dlogits, linear_logprob_fwd
from .reference import LossFn


@torch.library.custom_op(add_op_namespace_prefix("loss_chunk_fwd"), mutates_args=("buffer",))
def _loss_chunk_fwd(
    hidden_states: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [n]
    inv_temperature: Tensor,  # [n] float32
    softcap: float,
    buffer: Tensor | None,  # [n, V], overwritten by what is kept
    impl: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # logprobs, anchor, log_total [n], kept or [0]
    check_temperature_values(inv_temperature)
    if not group:
        check_label_values(labels, len(weight))
    head = Head(hidden_states, weight, labels.clamp(min=0), inv_temperature, softcap)
    local, kept = load_backend(impl).keep(head, out=buffer)
    stats = combine(local, labels, group)
    return *stats[:3], kept if buffer is None else buffer.new_empty(0)


@_loss_chunk_fwd.register_fake
def _(hidden_states, weight, labels, inv_temperature, softcap, buffer, impl, group):
    kept = hidden_states.new_empty(0, dtype=torch.float32)
    if buffer is None:
        kept = load_backend(impl).empty_kept(hidden_states, weight)
    return *(torch.empty_like(inv_temperature) for _ in range(3)), kept


@torch.library.custom_op(
    add_op_namespace_prefix("loss_chunk_bwd"), mutates_args=("kept", "grad_hidden", "grad_weight")
)
def _loss_chunk_bwd(
    grad_logprobs: Tensor,  # [n]
    logprobs: Tensor,  # [n]
    anchor: Tensor,  # [n]
    log_total: Tensor,  # [n]
    kept: Tensor,  # [n, V], overwritten
    hidden_states: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [n]
    inv_temperature: Tensor,  # [n]
    softcap: float,
    grad_hidden: Tensor | None,  # [n, D] float32, written
    grad_weight: Tensor | None,  # [V, D], written or, in float32, accumulated
    is_first: bool,
    impl: str,
    grad_group: str,
) -> None:
    head = Head(hidden_states, weight, labels, inv_temperature, softcap)
    stats = Statistics(logprobs, anchor, log_total, logprobs[:0])
    gradient = row_gradient(head, stats, grad_logprobs)
    gradient, scale = factor_out_exponent(gradient, hidden_states.dtype)
    dlogits = load_backend(impl).dlogits_from_kept(kept, head, stats, gradient)
    apply_dlogits(dlogits, scale, head, grad_hidden, grad_weight, is_first, grad_group)


@_loss_chunk_bwd.register_fake
def _(*args):
    return None


@torch.library.custom_op(add_op_namespace_prefix("attach_gradients"), mutates_args=())
def _attach_gradients_op(
    loss: Tensor,  # scalar
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    grad_hidden: Tensor | None,  # [N, D] float32
    grad_weight: Tensor | None,  # [V, D] float32 or of the dtype of the weight
) -> Tensor:
    """Hand a loss and its ready gradients to autograd."""
    return loss.clone()


@_attach_gradients_op.register_fake
def _(loss, hidden_states, weight, grad_hidden, grad_weight):
    return torch.empty_like(loss)


@torch.library.custom_op(add_op_namespace_prefix("scale_gradient"), mutates_args=())
def _scale_gradient_op(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad * upstream, rounded once to `dtype`."""
    return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))


@_scale_gradient_op.register_fake
def _(grad, upstream, dtype):
    return torch.empty_like(grad, dtype=dtype)


def _save_gradients(ctx, inputs, output):
    _, hidden_states, _, grad_hidden, grad_weight = inputs
    ctx.save_for_backward(grad_hidden, grad_weight)
    ctx.dtype = hidden_states.dtype


def _backward_loss(ctx, upstream):
    grads = (None if g is None else _scaled(g, upstream, ctx.dtype) for g in ctx.saved_tensors)
    return None, *grads, None, None


def _scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    # The upstream of `loss.backward()` is 1. A gradient that nobody needs again, and that needs no
    # rounding, is then returned as it is: the saved tensor itself. A GPU looks for itself, since
    # the host would have to wait for the value; while the graph is traced there is none.
    if grad.dtype == dtype and is_last_use(grad):
        if upstream.is_cuda:
            from . import _row_kernels

            return _row_kernels.scale_(grad, upstream)
        if upstream == 1:
            return grad
    # Under create_graph the gradients are made to need a gradient, so that asking for it raises.
    needs_grad = torch.is_grad_enabled()
    return _scale_gradient(grad.detach().requires_grad_(needs_grad), upstream, dtype)


_attach_gradients = differentiable(_attach_gradients_op, _backward_loss, _save_gradients)
_scale_gradient = refuse_double_backward(_scale_gradient_op)


def _weight_gradient_dtype(weight: Tensor, num_chunks: int) -> torch.dtype:
    # float16 has not the range for a gradient whose scale comes later, by the upstream of a scaler.
    is_rounded = weight.is_cuda and num_chunks == 1 and weight.dtype != torch.float16
    return weight.dtype if is_rounded else torch.float32


def _shared_buffer(head: Head, chunks: list[slice], impl: str) -> Tensor | None:
    """Return the chunk that all chunks use on a CPU; None where the allocator keeps freed memory.

    A CPU's allocator returns the pages of a chunk to the system; taking them again costs 4%.
    """
    if len(chunks) < 2 or impl != "chunked" or head.hidden_states.is_cuda:
        return None
    return _chunked.empty_kept(head.hidden_states[chunks[0]], head.weight)


def _loss_and_gradient(
    op: str, loss_fn: LossFn, logprobs: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:  # scalar, [n]
    if torch.compiler.is_compiling():
        # Dynamo traces this form. Eagerly, a plain leaf lets loss_fn keep what it computed.
        # `rows` is an argument, because a closure of constants alone would pin the number of rows.
        grad, loss = torch.func.grad_and_value(_chunk_loss)(logprobs, rows, op, loss_fn)
        return loss, grad
    leaf = logprobs.detach().requires_grad_()
    with torch.enable_grad():
        loss = _chunk_loss(leaf, rows, op, loss_fn)
    if not loss.requires_grad:
        return loss, torch.zeros_like(logprobs)
    _refuse_other_gradients(op, loss, leaf)
    (grad,) = torch.autograd.grad(loss, leaf, materialize_grads=True)
    return loss.detach(), grad


def _refuse_other_gradients(op: str, loss: Tensor, leaf: Tensor) -> None:
    """Refuse a loss of other tensors that require a gradient: they would silently get none."""
    nodes = [loss.grad_fn] if loss.grad_fn else []
    seen = {*nodes}
    while nodes:
        node = nodes.pop()
        if getattr(node, "variable", leaf) is not leaf:
            fault = "expected a loss_fn of logprobs alone, got another tensor that needs a gradient"
            raise ValueError(f"{op}: {fault}; detach it, or use linear_logprob")
        found = {inner for inner, _ in node.next_functions if inner is not None} - seen
        seen |= found
        nodes += found


def _chunk_loss(logprobs: Tensor, rows: slice, op: str, loss_fn: LossFn) -> Tensor:
    loss = loss_fn(logprobs, rows)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"{op}: expected loss_fn to return a scalar tensor, got {got}; sum over its rows"
        )
    return loss


def _chunks(num_rows: int, head: Head, impl: str, group: str) -> list[slice] | None:
    """Return the chunks; None in a trace that does not know whether one is enough."""
    if not torch.compiler.is_compiling():
        return row_chunks(*head[:2], impl, largest_shard(head.weight, group))
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if guard_or_false(num_rows == 0):
        return []
    # Of a vocabulary in shards a trace knows only its own.
    is_one = not group and guard_or_false(num_rows <= max_chunk_rows(head.weight, impl))
    return [slice(0, num_rows)] if is_one else None


def linear_logprob_loss(
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N] int64
    loss_fn: LossFn,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
    process_group: ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
) -> Tensor:  # scalar float32
    """Return sum over chunks of loss_fn(logprobs[rows], rows), with gradients formed on the way.

    Three GEMMs instead of four, because the loss is known while the logits still exist; the
    backward only scales. `loss_fn` is plain torch on n floats:

        def loss_fn(logprobs, rows):
            return -(advantages[rows] * logprobs).sum()

    It must be separable over rows (its sum over chunks is the loss) and may depend on parameters
    only through `logprobs`; any scalar may multiply the result. It is called once per chunk with a
    leaf tensor and the rows it covers, and never for an empty input, whose loss is a connected 0.
    Without gradients (`torch.no_grad`, or nothing requires them) only the loss is computed.

    Args:
        hidden_states: [N, D] bfloat16, float16 or float32; autocast as in `linear_logprob`.
        weight: [V, D] of the same dtype.
        labels: [N] int64 in [0, V), already shifted.
        loss_fn: ([n] float32 logprobs, rows: slice) -> scalar.
        temperature: a float or a float32 tensor [N], > 0.
        softcap: as in `linear_logprob`.
        impl: as in `linear_logprob`.
        process_group: as in `linear_logprob`.
        reduce_hidden_grad: as in `linear_logprob`.

    Raises:
        ValueError: as in `linear_logprob`, or `loss_fn` returns no scalar tensor, or one that
            depends on further tensors that require a gradient (not seen under torch.compile).
        RuntimeError: the named implementation cannot run here.
    """
    op = "linear_logprob_loss"
    options = (temperature, softcap, impl, process_group, reduce_hidden_grad)
    head, impl, group, grad_group = check_all(op, hidden_states, weight, labels, *options)
    if impl == "reference":
        return reference.linear_logprob_loss(
            *head[:3], loss_fn, temperature=temperature, softcap=softcap
        )
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{op}: torch.func cannot transform a loss whose gradients are formed in the forward; "
            f"use loss.backward() or torch.autograd.grad, or transform linear_logprob"
        )
    head = localize(head, group)
    num_rows, inputs = head[0].shape[0], head[:2]
    chunks = _chunks(num_rows, head, impl, group)
    if chunks is None:
        logprobs, *_ = linear_logprob_fwd(*head, False, impl, group, grad_group)
        return _chunk_loss(logprobs, slice(0, num_rows), op, loss_fn)
    needs_hidden, needs_weight = (torch.is_grad_enabled() and x.requires_grad for x in inputs)
    h, w = (x.detach() for x in inputs)
    head = head._replace(hidden_states=h, weight=w)
    grad_hidden = torch.empty_like(h, dtype=torch.float32) if needs_hidden else None
    dtype = _weight_gradient_dtype(w, len(chunks))
    grad_weight = empty_weight_gradient(w, len(chunks), dtype) if needs_weight else None
    loss = torch.zeros((), device=h.device)
    has_gradient = needs_hidden or needs_weight
    buffer = _shared_buffer(head, chunks, impl) if has_gradient else None
    for rows in chunks:
        chunk = head.rows(rows)
        if not has_gradient:
            logprobs, *_ = linear_logprob_fwd(*chunk, False, impl, group, "")
            loss += _chunk_loss(logprobs, rows, op, loss_fn).detach()
            continue
        chunk_buffer = None if buffer is None else buffer[: rows.stop - rows.start]
        logprobs, *parts, kept = _loss_chunk_fwd(*chunk, chunk_buffer, impl, group)
        kept = kept if chunk_buffer is None else chunk_buffer
        chunk_loss, grad_logprobs = _loss_and_gradient(op, loss_fn, logprobs, rows)
        loss += chunk_loss
        chunk_grad = None if grad_hidden is None else grad_hidden[rows]
        grads = (chunk_grad, grad_weight, rows.start == 0)
        _loss_chunk_bwd(grad_logprobs, logprobs, *parts, kept, *chunk, *grads, impl, grad_group)
        del kept  # before the next chunk is allocated
    return _attach_gradients(loss, *inputs, grad_hidden, grad_weight)
