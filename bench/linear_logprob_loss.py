"""A loss of log-probs with its gradients: the trainer's hot path, and the price of not fusing it.

    python -m bench.linear_logprob_loss                 Qwen2.5-7B, N = 8 to 32768
    python -m bench.linear_logprob_loss --cpu           resident memory and time on a CPU,
                                                        N = 2048, D = 512, V = 32000
    python -m bench.linear_logprob_loss --smoke         seconds on a CPU

The job is loss = sum_i row_weight_i logprob_i with row weights of both signs, as a policy gradient
has them. Providers of log-probs do it with that one line of torch on top; providers that give
only a mean take that instead, and are not ranked. The bound is three bare GEMMs.

With --cpu, "unfused logits held" is the baseline's arithmetic in a scope that keeps its logits
until the backward has run, as a loss function does when it gives them a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import laser_kernels
from bench import runner
from bench.exact import Exact
from bench.guard import guarded
from bench.harness import Entry, Error, Run
from bench.providers import (
    BASELINE,
    MEAN_PEERS,
    PROVIDERS,
    Provider,
    head_bounds,
    require_implementation,
)
from bench.shapes import Inputs

MODES = ("fwd", "fwd+bwd")
HELD = "unfused logits held"
CPU_PROVIDERS = (BASELINE, HELD, "ours chunked", "torch linear_cross_entropy", "bare GEMMs")

Loss = Callable[[Inputs], Tensor]


def entries(sets: list[Inputs]) -> list[Entry]:
    """Bounds, ours, baselines, peers with a result per row, peers with a mean."""
    weighted = Exact(sets[0], sets[0].row_weight)
    num_rows = len(sets[0].labels)
    mean = Exact(sets[0], torch.full_like(sets[0].row_weight, 1 / num_rows))
    found = head_bounds(sets, 3, MODES)
    for provider in (*PROVIDERS, *MEAN_PEERS):
        compose = _ours if provider.impl else _compose
        load = partial(compose, provider, sets[0])
        exact = weighted if provider.gives_rows else mean
        prepare = partial(_prepare, load, sets, exact, provider.is_exact)
        found.append(Entry(provider.name, prepare, provider.cannot, does_job=provider.gives_rows))
    return found


def entries_on_cpu(sets: list[Inputs]) -> list[Entry]:
    """The same, and the baseline whose logits have a name."""
    return [*entries(sets), Entry(HELD, partial(_prepare_held, sets))]


def _compose(provider: Provider, first: Inputs) -> Loss:
    logprobs = provider.load(first)

    def loss(inputs: Inputs) -> Tensor:
        result = logprobs(*inputs.leaves, inputs.labels)
        return (inputs.row_weight * result).sum() if provider.gives_rows else result

    return loss


def _ours(provider: Provider, first: Inputs) -> Loss:
    require_implementation(provider.impl, first)

    def loss(inputs: Inputs) -> Tensor:
        def weighted_sum(logprobs: Tensor, rows: slice) -> Tensor:
            return (inputs.row_weight[rows] * logprobs).sum()

        return laser_kernels.linear_logprob_loss(
            *inputs.leaves, inputs.labels, weighted_sum, impl=provider.impl
        )

    return loss


def _prepare(load: Callable[[], Loss], sets: list[Inputs], exact: Exact, is_exact: bool) -> Run:
    loss = load()

    def forward(number: int) -> Tensor:
        with torch.no_grad():
            return loss(sets[number % len(sets)])

    def both(number: int) -> tuple[Tensor, ...]:
        inputs = sets[number % len(sets)]
        return torch.autograd.grad(loss(inputs), inputs.leaves)

    def errors() -> dict[str, Error]:
        found = {"loss": exact.loss_error(forward(0), is_exact=is_exact)}
        return found | exact.gradient_errors(both(0), is_exact=is_exact)

    return Run({"fwd": forward, "fwd+bwd": both}, errors)


def _prepare_held(sets: list[Inputs]) -> Run:
    def both(number: int) -> tuple[Tensor, ...]:
        inputs = sets[number % len(sets)]
        logits = F.linear(*inputs.leaves).float()
        logprobs = logits.log_softmax(-1).gather(1, inputs.labels[:, None]).squeeze(1)
        return torch.autograd.grad((inputs.row_weight * logprobs).sum(), inputs.leaves)

    return Run({"fwd+bwd": both})


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Run the benchmark; returns the rows that it wrote."""
    options = runner.parser(__doc__)
    options.add_argument("--cpu", action="store_true", help="compare memory and time on a CPU")
    args = options.parse_args(argv)
    modes, make = MODES, entries
    if args.cpu:
        modes, make = MODES[1:], entries_on_cpu
        args.shapes, args.rows = "cpu", "2048"
        args.only = args.only or ",".join(CPU_PROVIDERS)
    return runner.run_head("linear_logprob_loss", args, make, modes=modes, baseline=BASELINE)


if __name__ == "__main__":
    guarded(main)
