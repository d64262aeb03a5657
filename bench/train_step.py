"""Measure what the fused head changes in a whole optimizer step.

    python -m bench.train_step                  Qwen2.5-1.5B's shape, 16 x 1024 tokens, on a GPU
    python -m bench.train_step --smoke          the quickstart's shape and batch, on a CPU
    python -m bench.train_step --model FOLDER   a real model, 16 short completions, on a CPU too

    head    from the last hidden states to their gradient and the head's: head and loss
    step    forward, backward, gradient clipping and AdamW of all microbatches

All providers train the same model on the same packed microbatches with the joint loss of LaSeR:

    plain logits       model(...).logits, as trainers do without a fused head
    laser_fast         model.policy and training.objective, as the trainer calls them
    body + kernel      the model's body and linear_logprob_loss; needs no configuration library
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench import runner
from bench.exact import Exact
from bench.guard import guarded
from bench.harness import Case, Entry, Error, Run, measure
from bench.shapes import Inputs
from bench.workload import (
    QUICKSTART,
    QWEN_1_5B,
    SCORE_TOKEN,
    load_model,
    make_microbatches,
    make_model,
)
from laser_fast.algorithm.loss import importance_weights, policy_loss
from laser_fast.algorithm.score import score_loss
from laser_fast.model.attention import attention_kwargs
from laser_fast.model.families import LmHead
from laser_fast.records import Microbatch
from laser_kernels import linear_logprob_loss

BASELINE = "plain logits"
BETA, REF_LOGPROB, SCORE_COEF = 0.15, -11.7, 1.0


LossOfRows = Callable[[Tensor, slice], Tensor]
Head = Callable[[Tensor, Tensor, Microbatch], Tensor]  # (hidden [T, D], weight, batch) -> loss
Forward = Callable[[PreTrainedModel, Microbatch], Tensor]  # -> loss


def joint_loss(batch: Microbatch) -> LossOfRows:
    """The loss of laser_fast.training.objective, from the same public functions."""

    def loss_fn(logprobs: Tensor, rows: slice) -> Tensor:
        policy, score = batch.labelled(rows)
        policy_logprobs, score_logprobs = logprobs.split([len(policy), len(score)])
        old = policy_logprobs.detach()
        terms = policy_loss(policy_logprobs, old, policy.advantages)
        terms = terms * importance_weights(old, policy.rollout_logprobs, cap=2.0)
        score_terms = score_loss(
            score_logprobs, score.rewards, score.weights, beta=BETA, ref_logprob=REF_LOGPROB
        )
        return (policy.weights * terms).sum() + SCORE_COEF * score_terms.sum()

    return loss_fn


def _loss_of_logits(logits: Tensor, batch: Microbatch) -> Tensor:
    logits = logits[batch.rows].float() / batch.temperature[:, None]
    logprobs = logits.log_softmax(-1).gather(1, batch.labels[:, None]).squeeze(1)
    return joint_loss(batch)(logprobs, slice(0, len(logprobs)))


def _model_inputs(batch: Microbatch) -> dict:
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "use_cache": False,
        **attention_kwargs(batch.segments, batch.input_ids.device),
    }


def plain() -> tuple[Head, Forward]:
    """Logits of every position, then those of the labelled rows."""

    def head(hidden_states: Tensor, weight: Tensor, batch: Microbatch) -> Tensor:
        return _loss_of_logits(torch.nn.functional.linear(hidden_states, weight), batch)

    def forward(model: PreTrainedModel, batch: Microbatch) -> Tensor:
        return _loss_of_logits(model(**_model_inputs(batch)).logits[0], batch)

    return head, forward


def body_and_kernel() -> tuple[Head, Forward]:
    """The labelled rows of the hidden states, through the fused loss."""

    def head(hidden_states: Tensor, weight: Tensor, batch: Microbatch) -> Tensor:
        return linear_logprob_loss(
            hidden_states[batch.rows],
            weight,
            batch.labels,
            joint_loss(batch),
            temperature=batch.temperature,
        )

    def forward(model: PreTrainedModel, batch: Microbatch) -> Tensor:
        hidden_states = model.model(**_model_inputs(batch)).last_hidden_state[0]
        return head(hidden_states, model.lm_head.weight, batch)

    return head, forward


def trainer() -> tuple[Head, Forward]:
    """What the trainer runs, on one unsharded device."""
    from laser_fast.algorithm.score import SelfScore
    from laser_fast.config import LossConfig
    from laser_fast.model.policy import Policy
    from laser_fast.training import objective

    score = SelfScore(token_id=SCORE_TOKEN, beta=BETA, ref_logprob=REF_LOGPROB)
    settings = objective.Objective(loss=LossConfig(), score=score, score_coef=SCORE_COEF)

    def head(hidden_states: Tensor, weight: Tensor, batch: Microbatch) -> Tensor:
        return objective.joint_loss(settings, batch)(hidden_states[batch.rows], LmHead(weight)).loss

    def forward(model: PreTrainedModel, batch: Microbatch) -> Tensor:
        policy = Policy(model, compute_dtype=model.dtype)
        return policy(batch, objective.joint_loss(settings, batch)).loss

    return head, forward


PROVIDERS = {BASELINE: plain, "laser_fast": trainer, "body + kernel": body_and_kernel}


def prepare(
    load: Callable[[], tuple[Head, Forward]],
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: list[Microbatch],
    hidden_states: Tensor,  # [T, D] of the first microbatch
) -> Run:
    """The two modes of one provider; the model and the optimizer's state are shared by all."""
    head, forward = load()
    weight = model.lm_head.weight

    def head_only(number: int) -> tuple[Tensor, ...]:
        leaf = hidden_states.requires_grad_()
        return torch.autograd.grad(head(leaf, weight, batches[0]), (leaf, weight))

    def step(number: int) -> None:
        for batch in batches:
            forward(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def errors() -> dict[str, Error]:
        batch = batches[0]
        rows = Inputs(hidden_states.detach()[batch.rows], weight, batch.labels, batch.temperature)
        logprobs = Exact(rows, batch.temperature).logprobs.float().requires_grad_()
        loss = joint_loss(batch)(logprobs, slice(0, len(logprobs)))
        (row_weight,) = torch.autograd.grad(loss, logprobs)
        grad_hidden, grad_weight = head_only(0)
        found = (grad_hidden[batch.rows], grad_weight)
        return Exact(rows, row_weight).gradient_errors(found, is_exact=load is not plain)

    return Run({"head": head_only, "step": step}, errors)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Run the benchmark; returns the rows that it wrote."""
    parser = runner.parser(__doc__)
    parser.add_argument("--model", help="Hugging Face folder of a model; default: random weights")
    args = parser.parse_args(argv)
    device = runner.device_of(args)
    workload = QWEN_1_5B if device.type == "cuda" else QUICKSTART
    results = runner.Results("train_step", args, device)
    if args.model:
        workload, model = load_model(args.model, device)
    else:
        model = make_model(workload, device)
    batches = make_microbatches(workload, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7)
    with torch.no_grad():
        hidden_states = model.model(**_model_inputs(batches[0])).last_hidden_state[0]
    label = {
        "op": "train_step",
        "shape": workload.name,
        "V": workload.sizes.vocabulary,
        "T": sum(len(batch.input_ids) for batch in batches),
        "N": sum(len(batch.labels) for batch in batches),
        "microbatches": len(batches),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    state = (model, optimizer, batches, hidden_states)
    entries = [Entry(name, partial(prepare, load, *state)) for name, load in PROVIDERS.items()]
    case = Case(label, ("head", "step"), runner.select(entries, args), BASELINE, device)
    rows = measure(case, runner.budget(args), on_start=runner.announce, on_rows=results.show)
    results.add(rows)
    return results.rows


if __name__ == "__main__":
    guarded(main)
