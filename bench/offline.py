"""Run the ops for a GPU that is not there: what they would launch, and Triton's kernels compiled.

    launches(loss, 90, 8192, impl="triton")

Tensors are on the meta device and call themselves CUDA tensors, so that the ops choose tiles and
launch as on the device. A kernel of Triton is compiled as its own launcher would compile it, with
what that finds out about types and alignment; one of csrc/ is noted by its name and arguments; any
other operator by the bytes it moves. It needs Triton compiled, not interpreted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from math import prod
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import laser_kernels
from bench.shapes import SHAPES
from laser_kernels import _extension

MULTIPROCESSORS = 132
SHAPE = SHAPES["qwen2.5-7b"]


class Launch(NamedTuple):
    """One kernel. `kind` is triton, csrc, gemm (of a library) or pointwise."""

    kind: str
    name: str
    arguments: dict[str, object]
    compiled: object = None  # of Triton
    num_bytes: int = 0  # read and written


class Device(ExitStack):
    """A device of an architecture such as 90, while it is entered."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch
        self.launches: list[Launch] = []

    def __enter__(self) -> Device:
        super().__enter__()
        previous = driver._active
        self.callback(setattr, driver, "_active", previous)
        driver.set_active(_Driver(self.arch))
        properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS, major=self.arch // 10)
        for owner, name, value in (
            (torch.cuda, "get_device_capability", lambda *_: divmod(self.arch, 10)),
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (torch.cuda, "device", lambda *_: nullcontext()),
            (torch.Tensor, "is_cuda", property(lambda _: True)),
            # Its devices are a fixed list.
            (torch, "autocast", lambda *_, **__: nullcontext()),
            (JITFunction, "run", self._compile()),
            (_extension, "load", lambda: _extension.Cuda(_Namespace(self.launches))),
        ):
            self.enter_context(mock.patch.object(owner, name, value))
        self.enter_context(_Operators(self.launches))
        return self

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A tensor of the device."""
        return torch.empty(shape, dtype=dtype, device="meta")

    def _compile(self):
        run = JITFunction.run

        def compile_only(kernel, *args, grid, warmup, **options):
            names = [*kernel.arg_names[: len(args)], *options]
            arguments = dict(zip(names, [*args, *options.values()], strict=True))
            compiled = run(kernel, *args, grid=grid, warmup=True, **options)
            self.launches.append(Launch("triton", kernel.__name__, arguments, compiled))

        return compile_only


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Namespace:
    """The operators of csrc/, which only note that they were called."""

    def __init__(self, launches: list[Launch]) -> None:
        self.launches = launches

    def __getattr__(self, name: str):
        def launch(*args: object) -> None:
            matrices = [x for x in args if isinstance(x, Tensor) and x.dim() == 2]
            shape = dict(zip(("hidden", "weight", "out"), matrices, strict=False))
            # The last argument of the statistics is the partials.
            partials = {} if name == "dlogits" else {"partials_ptr": args[-1]}
            self.launches.append(Launch("csrc", name, shape | partials))

        return launch


class _Operators(TorchDispatchMode):
    """Notes every operator that launches something; runs the body of ours, not its fake."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        if name.startswith("laser_kernels::"):
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        name = name.removeprefix("aten::")
        if name in ("mm", "addmm"):
            return self._gemm(name, args, kwargs)
        result = function(*args, **kwargs)
        returns = [x.alias_info for x in function._schema.returns]
        makes_view = any(alias and not alias.is_write for alias in returns)
        if not makes_view and "empty" not in name and "detach" not in name:
            # What an operator writes without reading it first.
            writes = ("copy_", "fill_", "zero_")
            first = int(name in writes or name.startswith("new_") or name.endswith("_like"))
            outputs = result if isinstance(result, (tuple, list)) else [result]
            num_bytes = sum(map(size, (*args[first:], *outputs)))
            self.launches.append(Launch("pointwise", name, {}, num_bytes=num_bytes))
        return result

    def _gemm(self, name: str, args, kwargs) -> Tensor:
        accumulates = name == "addmm"
        a, b = (x for x in args[accumulates:] if isinstance(x, Tensor))
        dtypes = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)]
        out = kwargs.get("out")
        if out is None:
            dtype = dtypes[0] if dtypes else a.dtype
            out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device="meta")
        sizes = {"m": a.shape[0], "n": b.shape[1], "k": a.shape[1]}
        self.launches.append(
            Launch(
                "gemm",
                name,
                sizes | {"itemsize": out.itemsize, "accumulates": accumulates},
                num_bytes=size(a) + size(b) + size(out) * (1 + accumulates),
            )
        )
        return out


def size(x: object) -> int:
    """Bytes of a tensor or of what a descriptor covers; of anything else none."""
    if isinstance(x, TensorDescriptor):
        x = x.base
    return prod(x.shape) * x.itemsize if isinstance(x, Tensor) else 0


# ------------------------------------------------------------------------ the ops, of the 7B head

# (device, H, W, labels, options of the op).
Op = Callable[..., None]


def scoring(device: Device, h: Tensor, w: Tensor, labels: Tensor, **options: object) -> None:
    """Log-probs without gradient."""
    with torch.no_grad():
        laser_kernels.linear_logprob(h, w, labels, **options)


def loss(device: Device, h: Tensor, w: Tensor, labels: Tensor, **options: object) -> None:
    """A loss with its gradients."""
    weights = device.empty(len(h), dtype=torch.float32)

    def loss_fn(logprobs: Tensor, rows: slice) -> Tensor:
        return (weights[rows] * logprobs).sum()

    result = laser_kernels.linear_logprob_loss(h, w, labels, loss_fn, **options)
    torch.autograd.grad(result, (h, w))


def any_gradient(device: Device, h: Tensor, w: Tensor, labels: Tensor, **options: object) -> None:
    """Log-probs with any gradient, which recomputes them."""
    logprobs = laser_kernels.linear_logprob(h, w, labels, **options)
    torch.autograd.grad(logprobs, (h, w), torch.empty_like(logprobs))


def entropy(device: Device, h: Tensor, w: Tensor, labels: Tensor, **options: object) -> None:
    """Log-probs and entropies with gradients of both."""
    outputs = laser_kernels.linear_logprob_entropy(h, w, labels, **options)
    torch.autograd.grad(outputs, (h, w), [torch.empty_like(x) for x in outputs])


def score(device: Device, h: Tensor, w: Tensor, labels: Tensor, **options: object) -> None:
    """The last-token score."""
    laser_kernels.last_token_score(h, w, 7, beta=0.1, ref_logprob=-23.0, **options)


def last_token(device: Device, h: Tensor, w: Tensor, labels: Tensor, **options: object) -> Tensor:
    """The last-token loss, ready for its backward."""
    rewards = device.empty(len(h), dtype=torch.float32)
    constants = dict(beta=0.1, ref_logprob=-23.0)
    return laser_kernels.last_token_loss(h, w, 7, rewards, **constants, **options)[0]


def last_token_both(
    device: Device, h: Tensor, w: Tensor, labels: Tensor, **options: object
) -> None:
    """The last-token loss and both gradients."""
    torch.autograd.grad(last_token(device, h, w, labels, **options), (h, w))


def launches(
    op: Op,
    arch: int,
    num_rows: int,
    D: int = SHAPE.hidden_size,
    V: int = SHAPE.vocabulary,
    **options: object,
) -> list[Launch]:
    """What one call of an op launches on a device that is not there."""
    with Device(arch) as device:
        h, w = (device.empty(size, D).requires_grad_() for size in (num_rows, V))
        op(device, h, w, device.empty(num_rows, dtype=torch.int64), **options)
    return device.launches
