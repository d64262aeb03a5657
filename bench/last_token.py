"""The last-token score and its loss on few rows, where memory traffic is the whole cost.

    python -m bench.last_token                          Qwen2.5-7B, B = 8, 64, 256, 1024
    python -m bench.last_token --smoke                  seconds on a CPU

    score       only scores, no gradient                 bound: W read once
    fwd         loss, with what its backward needs       bound: W read once
    fwd+bwd     loss and both gradients                  bound: W read twice and dW written once

A read of W takes half of the time in which the same process copies W. Peers do the job as one
label per row, with the squared error in torch on top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import laser_kernels
from bench import runner
from bench.exact import Exact
from bench.guard import guarded
from bench.harness import Entry, Error, Run
from bench.providers import (
    BASELINE,
    BASELINES,
    OURS,
    PEERS,
    Provider,
    require_implementation,
    weight_stream,
)
from bench.shapes import Inputs

MODES = ("score", "fwd", "fwd+bwd")
TOKEN, BETA, REF_LOGPROB = 7, 0.1, -23.0

LossAndScores = Callable[[Inputs, Tensor], tuple[Tensor, Tensor]]


def entries(sets: list[Inputs]) -> list[Entry]:
    """Every provider with a result per row, then the bound."""
    sets = [replace(inputs, labels=torch.full_like(inputs.labels, TOKEN)) for inputs in sets]
    # Alternating rewards: right and wrong answers.
    rewards = torch.arange(len(sets[0].labels), device=sets[0].labels.device).remainder(2).float()
    found = []
    for provider in (*BASELINES, *OURS, *PEERS):
        compose = _ours if provider.impl else _compose
        load = partial(compose, provider, sets[0])
        prepare = partial(_prepare, load, sets, rewards, provider.is_exact)
        found.append(Entry(provider.name, prepare, provider.cannot))
    stream = {"score": 1, "fwd": 1, "fwd+bwd": 3}
    bound = Entry("stream of W", lambda: weight_stream(sets, stream), is_bound=True)
    return [*found, bound]


def _compose(provider: Provider, first: Inputs) -> LossAndScores:
    logprobs_of = provider.load(first)

    def loss_and_scores(inputs: Inputs, rewards: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = logprobs_of(*inputs.leaves, inputs.labels)
        scores = BETA * (logprobs - REF_LOGPROB)
        return (scores - rewards).square().mean(), scores.detach()

    return loss_and_scores


def _ours(provider: Provider, first: Inputs) -> LossAndScores:
    require_implementation(provider.impl, first)

    def loss_and_scores(inputs: Inputs, rewards: Tensor) -> tuple[Tensor, Tensor]:
        return laser_kernels.last_token_loss(
            *inputs.leaves, TOKEN, rewards, beta=BETA, ref_logprob=REF_LOGPROB, impl=provider.impl
        )

    return loss_and_scores


def _prepare(
    load: Callable[[], LossAndScores], sets: list[Inputs], rewards: Tensor, is_exact: bool
) -> Run:
    loss_and_scores = load()

    def score(number: int) -> Tensor:
        with torch.no_grad():
            return loss_and_scores(sets[number % len(sets)], rewards)[1]

    def forward(number: int) -> Tensor:
        return loss_and_scores(sets[number % len(sets)], rewards)[0]

    def both(number: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(number), sets[number % len(sets)].leaves)

    def errors() -> dict[str, Error]:
        first = sets[0]
        logprobs = Exact(first, first.row_weight).logprobs
        residual = BETA * (logprobs - REF_LOGPROB) - rewards
        # dloss/dlogprob = 2 beta (score - reward) / B makes the loss linear around this point.
        exact = Exact(first, 2 * BETA * residual / len(residual))
        found = {
            "logprob": exact.logprob_error(
                score(0).double() / BETA + REF_LOGPROB, is_exact=is_exact
            )
        }
        return found | exact.gradient_errors(both(0), is_exact=is_exact)

    return Run({"score": score, "fwd": forward, "fwd+bwd": both}, errors)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Run the benchmark; returns the rows that it wrote."""
    options = runner.parser(__doc__)
    options.set_defaults(rows="8,64,256,1024")
    args = options.parse_args(argv)
    return runner.run_head("last_token", args, entries, modes=MODES, baseline=BASELINE)


if __name__ == "__main__":
    guarded(main)
