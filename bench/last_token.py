"""The last-token score and its loss on few rows, where memory traffic is the whole cost.

    python -m bench.last_token                          Qwen2.5-7B, B = 8 to 1024
    python -m bench.last_token --smoke                  seconds on a CPU

    score       only scores, no gradient                 bounds: W read once, one GEMM
    fwd         loss, with what its backward needs       bounds: W read once, one GEMM
    fwd+bwd     loss and both gradients                  bounds: W read twice and dW written once,
                                                         three GEMMs

A read of W takes half of the time in which the same process copies W. Peers do the job as one
label per row, with the squared error in torch on top.

The clock is the device's: launching takes the host longer than few rows take a GPU, so the table
shows both, "ms" and "host ms". A training loop that is not far ahead of its GPU pays the larger.
"graph" is the same call captured as a CUDA graph and replayed, which takes the host one launch; the
graph holds its memory from its capture on, so its peak is zero.
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
from bench.harness import Call, Entry, Error, Run
from bench.providers import BASELINE, PROVIDERS, Provider, head_bounds, require_implementation
from bench.shapes import Inputs

MODES = ("score", "fwd", "fwd+bwd")
TOKEN, BETA, REF_LOGPROB = 7, 0.1, -23.0

LossAndScores = Callable[[Inputs, Tensor], tuple[Tensor, Tensor]]


def entries(sets: list[Inputs]) -> list[Entry]:
    """The bounds, then every provider with a result per row, ours also as CUDA graphs."""
    sets = [replace(inputs, labels=torch.full_like(inputs.labels, TOKEN)) for inputs in sets]
    # Alternating rewards: right and wrong answers.
    rewards = torch.arange(len(sets[0].labels), device=sets[0].labels.device).remainder(2).float()
    found = head_bounds(sets, 3, MODES)
    for provider in PROVIDERS:
        compose = _ours if provider.impl else _compose
        load = partial(compose, provider, sets[0])
        prepare = partial(_prepare, load, sets, rewards, provider.is_exact)
        found.append(Entry(provider.name, prepare, provider.cannot))
        if provider.impl in ("triton", "cuda"):
            prepare = partial(prepare, wrap=partial(captured, num_sets=len(sets)))
            found.append(Entry(f"{provider.name} graph", prepare))
    return found


def captured(call: Call, num_sets: int) -> Call:
    """Return a call that replays a CUDA graph of `call`: one graph for each set of inputs."""
    graphs, results = [], []
    for number in range(num_sets):
        # A kernel that is compiled or loaded, and a library's workspace, come before the capture.
        call(number)
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(call(number))

    def replay(number: int) -> object:
        graphs[number % num_sets].replay()
        return results[number % num_sets]

    return replay


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
    load: Callable[[], LossAndScores],
    sets: list[Inputs],
    rewards: Tensor,
    is_exact: bool,
    wrap: Callable[[Call], Call] = lambda call: call,
) -> Run:
    loss_and_scores = load()

    def score(number: int) -> Tensor:
        with torch.no_grad():
            return loss_and_scores(sets[number % len(sets)], rewards)[1]

    def forward(number: int) -> Tensor:
        return loss_and_scores(sets[number % len(sets)], rewards)[0]

    def both(number: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(number), sets[number % len(sets)].leaves)

    calls = {mode: wrap(call) for mode, call in zip(MODES, (score, forward, both), strict=True)}

    def errors() -> dict[str, Error]:
        first = sets[0]
        logprobs = Exact(first, first.row_weight).logprobs
        residual = BETA * (logprobs - REF_LOGPROB) - rewards
        # dloss/dlogprob = 2 beta (score - reward) / B makes the loss linear around this point.
        exact = Exact(first, 2 * BETA * residual / len(residual))
        found = {
            "logprob": exact.logprob_error(
                calls["score"](0).double() / BETA + REF_LOGPROB, is_exact=is_exact
            )
        }
        return found | exact.gradient_errors(calls["fwd+bwd"](0), is_exact=is_exact)

    return Run(calls, errors)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Run the benchmark; returns the rows that it wrote."""
    options = runner.parser(__doc__)
    options.set_defaults(rows="8,64,128,256,512,1024")
    args = options.parse_args(argv)
    return runner.run_head("last_token", args, entries, modes=MODES, baseline=BASELINE)


if __name__ == "__main__":
    guarded(main)
