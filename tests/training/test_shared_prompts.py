"""A group that computes its prompt once trains like one that repeats it, gradient by gradient."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_models import EOS, SCORE_TOKEN, make_model, make_sequences

from laser_fast.algorithm.score import SelfScore
from laser_fast.config import LossConfig
from laser_fast.model.logprobs import label_logprobs
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy
from laser_fast.training import objective
from laser_fast.training.objective import Objective, joint_loss
from laser_kernels import reference

SCORE = SelfScore(token_id=SCORE_TOKEN, beta=0.2, ref_logprob=-7.5)
OTHER_EOS = 4


def mixed(sequences):
    """Completions that end with two EOS ids in turn, with scores at both rows."""
    is_scored = [sequence.score_at is not None for sequence in sequences]
    return [
        replace(
            sequence,
            completion_ids=(*sequence.completion_ids[:-1], (EOS, OTHER_EOS)[index % 2]),
            score_at=("eos", "last")[index // 2 % 2],
        )
        if is_scored[index]
        else sequence
        for index, sequence in enumerate(sequences)
    ]


SEQUENCES = mixed(make_sequences(17, seed=3, group_size=4))  # the last group has one
# Everything in one microbatch; groups whole; groups in parts, each with the prompt.
BUDGETS = (999, 70, 30)
LOSSES = [
    LossConfig(),
    LossConfig(kind="gspo"),
    LossConfig(kind="cispo"),
    LossConfig(clip_dual=3.0, aggregation="seq-mean-token-mean"),
    LossConfig(entropy_coef=0.01),
    LossConfig(kl_coef=0.1),
    LossConfig(importance="sequence-truncate"),
]


@pytest.fixture(params=[torch.float32, torch.float64])
def dtype(request, monkeypatch):
    if request.param == torch.float64:  # which only the specification of the kernels takes
        for name in ("linear_logprob", "linear_logprob_entropy", "linear_logprob_loss"):
            monkeypatch.setattr(objective, name, getattr(reference, name))
        for module in ("logprobs", "policy"):
            name = f"laser_fast.model.{module}.linear_logprob"
            monkeypatch.setattr(name, reference.linear_logprob)
    return request.param


def make_policy(family, dtype):
    hf = make_model(family).to(dtype)
    if dtype == torch.float64:  # transformers' norms compute in float32, whatever the dtype is
        for norm in (m for m in hf.modules() if type(m).__name__.endswith("RMSNorm")):
            norm.forward = partial(
                F.rms_norm,
                normalized_shape=norm.weight.shape,
                weight=norm.weight,
                eps=norm.variance_epsilon,
            )
    hf.set_attn_implementation("laser_torch")
    return Policy(hf, compute_dtype=dtype)


def make_packer(budget):
    device = torch.device("cpu")
    return Packer(
        budget=budget, score_token_id=SCORE_TOKEN, score_at="eos", temperature=0.7, device=device
    )


def relative_error(actual, exact):
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def repeated(sequences):
    """Microbatches of one sequence each: nothing is shared."""
    return [make_packer(999).pack([sequence]) for sequence in sequences]


def train(policy, batches, loss):
    """Loss and gradients, with old log-probs of a policy that is a little off, and a reference."""
    generator = torch.Generator().manual_seed(0)
    total, batches = torch.zeros((), dtype=torch.float64), list(batches)
    for batch, logprobs in zip(batches, label_logprobs(policy, batches), strict=True):
        own = logprobs[: len(batch.policy)]
        # Off by what the label says, so that it does not depend on the order of the rows.
        off = torch.randn(99, generator=generator.manual_seed(1))[batch.labels[: len(own)]]
        logprobs = {"old_logprobs": own + 0.2 * off}
        if loss.kl_coef:
            logprobs["ref_logprobs"] = own + 0.3 * off
        batch = replace(batch, policy=replace(batch.policy, **logprobs))
        result = policy(batch, joint_loss(Objective(loss=loss, score=SCORE, score_coef=0.8), batch))
        result.loss.backward()
        total += result.loss.detach()
    grads = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    return total, grads


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(
    "loss", LOSSES, ids=lambda loss: str(loss.model_dump(exclude_defaults=True))
)
def test_loss_and_gradients_equal_those_of_repeated_prompts(family, loss, dtype):
    policy = make_policy(family, dtype)
    expected_loss, expected = train(policy, repeated(SEQUENCES), loss)
    limit = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    for budget in BUDGETS:
        batches = make_packer(budget).microbatches(SEQUENCES)
        found_loss, found = train(policy, batches, loss)
        assert abs(found_loss - expected_loss) <= limit * abs(expected_loss)
        for name, grad in expected.items():
            assert relative_error(found[name], grad) <= limit, (budget, name)


def test_a_group_computes_its_prompt_once():
    lengths = [len(sequence.response_ids) for sequence in SEQUENCES]
    prompts = {sequence.prompt_ids for sequence in SEQUENCES}
    (batch,) = make_packer(999).microbatches(SEQUENCES)
    assert len(batch.input_ids) == sum(lengths) + sum(map(len, prompts))
    # A response that nothing reads beyond its first label takes no token at all.
    assert sum(segment.length for segment in batch.segments) == len(batch.input_ids)


def test_bfloat16_is_within_its_rounding():
    single = make_policy("qwen2", torch.float32)
    _, expected = train(single, repeated(SEQUENCES), LOSSES[0])
    half = make_policy("qwen2", torch.bfloat16)
    _, apart = train(half, repeated(SEQUENCES), LOSSES[0])
    _, shared = train(half, make_packer(999).microbatches(SEQUENCES), LOSSES[0])
    for name, grad in expected.items():
        error = relative_error(shared[name].float(), grad)
        assert error <= 1.5 * relative_error(apart[name].float(), grad) + 1e-3, name


def test_what_has_no_rows_changes_nothing():
    """Completions without advantage leave, and one of them may be the first of its group."""
    sequences = [
        replace(sequence, advantage=0.0, has_policy_rows=False) if index % 3 != 1 else sequence
        for index, sequence in enumerate(SEQUENCES)
    ]
    kept = [replace(sequence, has_policy_rows=True) for sequence in sequences]
    policy = make_policy("qwen2", torch.float32)
    loss, grads = train(policy, make_packer(999).microbatches(kept), LOSSES[0])
    left = [sequence for sequence in sequences if sequence.has_rows]
    assert len(left) < len(sequences)
    found_loss, found = train(policy, make_packer(999).microbatches(left), LOSSES[0])
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=1e-7)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)
