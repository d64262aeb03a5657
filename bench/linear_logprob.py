"""Log-probs of labels: scoring ("fwd", no gradient) and any per-row gradient ("fwd+bwd").

    python -m bench.linear_logprob                      Qwen2.5-7B, N = 8 to 32768
    python -m bench.linear_logprob --shapes all --json results.json
    python -m bench.linear_logprob --smoke              seconds on a CPU

The bound of "fwd+bwd" is four bare GEMMs, because the upstream gradient comes after the op has
returned and the logits are gone; "unfused" keeps them, and needs three.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from bench import runner
from bench.exact import Exact
from bench.guard import guarded
from bench.harness import Entry, Error, Run
from bench.providers import BASELINE, PROVIDERS, Provider, head_bounds
from bench.shapes import Inputs

MODES = ("fwd", "fwd+bwd")


def entries(sets: list[Inputs]) -> list[Entry]:
    """The bounds, then every provider with a result per row."""
    exact = Exact(sets[0], sets[0].row_weight)
    return [
        *head_bounds(sets, 4, MODES),
        *(
            Entry(provider.name, partial(_prepare, provider, sets, exact), provider.cannot)
            for provider in PROVIDERS
        ),
    ]


def _prepare(provider: Provider, sets: list[Inputs], exact: Exact) -> Run:
    logprobs_of = provider.load(sets[0])

    def logprobs(number: int) -> torch.Tensor:
        inputs = sets[number % len(sets)]
        return logprobs_of(inputs.hidden_states, inputs.weight, inputs.labels)

    def forward(number: int) -> torch.Tensor:
        with torch.no_grad():
            return logprobs(number)

    def both(number: int) -> tuple[torch.Tensor, ...]:
        inputs = sets[number % len(sets)]
        result = logprobs(number)
        return torch.autograd.grad(result, inputs.leaves, inputs.row_weight.to(result.dtype))

    def errors() -> dict[str, Error]:
        kind = {"is_exact": provider.is_exact}
        found = {"logprob": exact.logprob_error(forward(0), **kind)}
        return found | exact.gradient_errors(both(0), **kind)

    return Run({"fwd": forward, "fwd+bwd": both}, errors)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Run the benchmark; returns the rows that it wrote."""
    args = runner.parser(__doc__).parse_args(argv)
    return runner.run_head("linear_logprob", args, entries, modes=MODES, baseline=BASELINE)


if __name__ == "__main__":
    guarded(main)
