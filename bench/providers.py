"""The providers of a head's log-probabilities, and what each of them cannot do.

Every provider is a function (hidden_states [N, D], weight [V, D], labels [N]) -> log-probs [N], or
-> their mean if it has no per-row result. `load` imports; the table names what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import laser_kernels
from bench.harness import Entry, Run, Unavailable
from bench.shapes import Inputs

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]

BASELINE = "unfused"
COMPILED = "unfused compiled"
# The specification materialises float32 logits several times over; at training sizes that takes
# tens of gigabytes and seconds.
MAX_REFERENCE_LOGITS = 2**28


@dataclass(frozen=True)
class Provider:
    """A way to compute log-probs. `is_exact`: its logits are never rounded to 16 bits."""

    name: str
    load: Callable[[Inputs], LogProbs]
    cannot: str = ""
    is_exact: bool = False
    gives_rows: bool = True
    impl: str = ""  # ours: which one


def unfused(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What a plain trainer does with a model's logits."""
    logits = F.linear(hidden_states, weight).float()
    return logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def compiled(inputs: Inputs) -> LogProbs:
    """The same under torch.compile, for one size, so that nothing recompiles or falls back."""
    torch.compiler.reset()
    return torch.compile(unfused, dynamic=False)


def require_implementation(impl: str, inputs: Inputs) -> None:
    """Say why one of ours is not measured here, instead of measuring something else."""
    if impl in ("triton", "cuda") and not inputs.weight.is_cuda:
        raise Unavailable("needs an NVIDIA GPU")
    if impl == "cuda":
        if torch.cuda.get_device_capability(inputs.weight.device) != (9, 0):
            raise Unavailable("needs a Hopper GPU")
        from laser_kernels import _extension

        if reason := _extension.missing():
            raise Unavailable(reason)
    num_logits = len(inputs.labels) * len(inputs.weight)
    if impl == "reference" and inputs.weight.is_cuda and num_logits > MAX_REFERENCE_LOGITS:
        raise Unavailable("the specification, not meant for this size")


def _ours(impl: str, inputs: Inputs) -> LogProbs:
    require_implementation(impl, inputs)
    return partial(laser_kernels.linear_logprob, impl=impl)


def _torch_rows(inputs: Inputs) -> LogProbs:
    return _torch_linear_cross_entropy("none")


def _torch_mean(inputs: Inputs) -> LogProbs:
    return _torch_linear_cross_entropy("mean")


def _torch_linear_cross_entropy(reduction: str) -> LogProbs:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, y: -F.linear_cross_entropy(h, w, y, reduction=reduction, options=options)


def _liger_scaled(inputs: Inputs) -> LogProbs:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return lambda h, w, y: -LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, y)


def _liger_mean(inputs: Inputs) -> LogProbs:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda h, w, y: -liger_fused_linear_cross_entropy(h, w, y)


def _cut_cross_entropy(inputs: Inputs) -> LogProbs:
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none", impl="cce")


def _trl_chunked(inputs: Inputs) -> LogProbs:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as COLUMNS

    # No bias, temperature 1, no soft-capping, scale 1, none of the optional outputs.
    return lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, COLUMNS, None, 1.0, ())[
        0
    ]


def _quack_mean(inputs: Inputs) -> LogProbs:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda h, w, y: -chunked_linear_cross_entropy(h, w, y)


_NO_ROW_TEMPERATURE = "a temperature per row"
_NLL_ONLY = "temperature, entropy"
_MEAN_ONLY = "a gradient per row, temperature, entropy"

# Per-row log-probs with any upstream gradient.
BASELINES = (Provider(BASELINE, lambda inputs: unfused), Provider(COMPILED, compiled))
OURS = tuple(
    Provider(f"ours {impl}", partial(_ours, impl), is_exact=True, impl=impl)
    for impl in ("triton", "chunked", "cuda", "reference")
)
PEERS = (
    Provider("liger scaled CE", _liger_scaled, _NO_ROW_TEMPERATURE),
    Provider("cut-cross-entropy", _cut_cross_entropy, _NLL_ONLY),
    Provider("trl chunked", _trl_chunked, _NO_ROW_TEMPERATURE),
    Provider("torch linear_cross_entropy", _torch_rows, _NLL_ONLY),
)

# These give only the mean of the log-probs.
MEAN_PEERS = (
    Provider("liger linear CE (mean)", _liger_mean, _MEAN_ONLY, gives_rows=False),
    Provider("quack (mean)", _quack_mean, _MEAN_ONLY, gives_rows=False),
    Provider("torch linear_cross_entropy (mean)", _torch_mean, _MEAN_ONLY, gives_rows=False),
)


# Ours come before whatever may take long or all of the memory.
PROVIDERS = (*OURS, *BASELINES, *PEERS)


def head_bounds(sets: list[Inputs], num_gemms: int, modes: Sequence[str]) -> list[Entry]:
    """What bounds an op of the head: its GEMMs, and the traffic of W, read and written once.

    Any mode but "fwd+bwd" is one GEMM and one read; that one reads W twice and writes dW.
    """
    passes = {mode: 3 if mode == "fwd+bwd" else 1 for mode in modes}
    return [
        Entry("bare GEMMs", lambda: bare_gemms(sets, num_gemms, modes), is_bound=True),
        Entry("stream of W", lambda: weight_stream(sets, passes), is_bound=True),
    ]


def bare_gemms(sets: list[Inputs], num_gemms: int, modes: Sequence[str]) -> Run:
    """Only the GEMMs, from the library, in the inputs' dtype: all in "fwd+bwd", Z in other modes.

    Three are Z, dH and dW; four make Z twice, for an op that returns before its gradient is known.
    """

    def forward(number: int) -> Tensor:
        hidden_states, weight = _matrices(sets, number)
        return hidden_states @ weight.T

    def both(number: int) -> tuple[Tensor, Tensor]:
        hidden_states, weight = _matrices(sets, number)
        for _ in range(num_gemms - 2):
            logits = hidden_states @ weight.T
        return logits @ weight, logits.T @ hidden_states

    return Run({mode: both if mode == "fwd+bwd" else forward for mode in modes})


def weight_stream(sets: list[Inputs], passes: dict[str, int]) -> Run:
    """Only the weight's memory traffic, from the time of a copy, which reads and writes it once.

    `passes` says how often each mode must read or write it at least.
    """
    target = torch.empty_like(_matrices(sets, 0)[1])
    calls = {mode: lambda number: target.copy_(_matrices(sets, number)[1]) for mode in passes}
    return Run(calls, scale={mode: count / 2 for mode, count in passes.items()})


def _matrices(sets: list[Inputs], number: int) -> tuple[Tensor, Tensor]:
    inputs = sets[number % len(sets)]
    return inputs.hidden_states.detach(), inputs.weight.detach()
