"""The joint loss of a packed microbatch equals its definition on full logits."""

from dataclasses import replace

import pytest
import torch
from tiny_models import SCORE_TOKEN, make_model, make_sequences, naive_logprobs, naive_loss

from laser_fast.algorithm.score import SelfScore
from laser_fast.config import LossConfig
from laser_fast.model.logprobs import label_logprobs
from laser_fast.model.packing import Packer
from laser_fast.model.policy import Policy
from laser_fast.training.objective import Objective, joint_loss

TEMPERATURE = 0.7


@pytest.fixture(autouse=True)
def two_chunks(monkeypatch):
    """The head works in its smallest chunks, 128 rows."""
    monkeypatch.setenv("LASER_KERNELS_WORKSPACE_MB", "0.001")


@pytest.fixture(scope="module")
def policy():
    hf = make_model()
    hf.set_attn_implementation("laser_torch")
    return Policy(hf, compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def exact():
    """The same model in float64, as transformers runs it."""
    return make_model().double()


@pytest.fixture(scope="module", params=["policy rows", "score rows"])
def sequences(request):
    """Sequences whose policy rows, or whose score rows, lie in both chunks."""
    if request.param == "policy rows":
        sequences = make_sequences(32)
        first, last = 0, len(pack(sequences).policy)
    else:
        sequences = make_sequences(30, longest=6)
        first, last = len(pack(sequences).policy), len(pack(sequences).rows)
    assert first < 128 - 3 < 128 + 3 < last <= 256
    return [  # scores of both positions
        replace(sequence, score_at="last") if sequence.score_at and index % 2 else sequence
        for index, sequence in enumerate(sequences)
    ]


def make_objective(*, score_coef=0.8, **loss):
    return Objective(
        loss=LossConfig(**{"tis_cap": 0.0, **loss}),
        score=SelfScore(token_id=SCORE_TOKEN, beta=0.2, ref_logprob=-7.5),
        score_coef=score_coef,
    )


def pack(sequences):
    packer = Packer(
        budget=600,
        score_token_id=SCORE_TOKEN,
        score_at="eos",
        temperature=TEMPERATURE,
        device=torch.device("cpu"),
    )
    return packer.pack(sequences)


def perturbed_logprobs(exact, sequences, *, spread, seed):
    """Log-probs of other policies: those of `exact` with noise, by sequence."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for sequence in sequences:
        with torch.no_grad():
            rows, _ = naive_logprobs(exact, sequence, temperature=TEMPERATURE)
        chosen = rows.gather(1, torch.tensor(sequence.completion_ids)[:, None])[:, 0]
        noise = torch.randn(len(chosen), generator=generator, dtype=torch.float64)
        found.append(chosen + spread * noise)
    return found


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("loss", "first_update"),
    [
        ({}, True),
        ({"tis_cap": 2.0}, True),
        ({"kind": "cispo", "tis_cap": 1.5}, True),
        ({"kind": "gspo"}, True),
        ({"entropy_coef": 0.05}, True),
        ({"kl_coef": 0.1, "tis_cap": 2.0}, True),
        ({"tis_cap": 1.2, "importance": "token-mask"}, True),
        ({"tis_cap": 6.0, "importance": "sequence-truncate"}, True),
        ({"tis_cap": 1.5, "importance": "sequence-mask", "kind": "gspo"}, True),
        ({"tis_cap": 1.2, "importance": "token-mask"}, False),
        ({"tis_cap": 6.0, "importance": "sequence-mask"}, False),
        ({"clip_low": 0.1, "clip_high": 0.3, "tis_cap": 2.0}, False),
        ({"clip_dual": 1.2}, False),
        ({"kind": "cispo", "clip_low": 0.1, "clip_high": 0.3}, False),
        ({"kind": "gspo", "clip_low": 0.1, "clip_high": 0.1}, False),
        ({"kind": "gspo", "entropy_coef": 0.05, "kl_coef": 0.2}, False),
    ],
    ids=lambda value: str(value),
)
def test_joint_loss_equals_its_definition(policy, exact, sequences, loss, first_update):
    objective = make_objective(**loss)
    if "importance" in loss:  # so near that those of whole sequences are on both sides of the cap
        near = perturbed_logprobs(exact, sequences, spread=0.3, seed=3)
        sequences = [
            replace(sequence, rollout_logprobs=tuple(logprobs.tolist()))
            for sequence, logprobs in zip(sequences, near, strict=True)
        ]
    old = None if first_update else perturbed_logprobs(exact, sequences, spread=0.4, seed=1)
    ref = perturbed_logprobs(exact, sequences, spread=0.5, seed=2) if "kl_coef" in loss else None
    expected = naive_loss(exact, sequences, objective, temperature=TEMPERATURE, old=old, ref=ref)
    batch = pack(sequences)
    rows = replace(
        batch.policy,
        old_logprobs=None if old is None else torch.cat(old).float(),
        ref_logprobs=None if ref is None else torch.cat(ref).float(),
    )
    batch = replace(batch, policy=rows)
    result = policy(batch, joint_loss(objective, batch))
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=1e-6)

    names, parameters = zip(*policy.hf.named_parameters(), strict=True)
    # A non-trivial upstream gradient: the trainer multiplies the loss by the world size.
    actual = torch.autograd.grad(result.loss * 3, parameters)
    gradients = torch.autograd.grad(expected * 3, list(exact.parameters()))
    for name, got, want in zip(names, actual, gradients, strict=True):
        assert relative_error(got, want) < 2e-5, name


@pytest.mark.parametrize("kind", ["grpo", "cispo", "gspo"])
def test_clipping_is_reached_by_the_cases_above(exact, sequences, kind):
    old = perturbed_logprobs(exact, sequences, spread=0.4, seed=1)
    wide = make_objective(kind=kind, clip_low=1.0, clip_high=100.0)
    narrow = make_objective(kind=kind, clip_low=0.1, clip_high=0.1)
    losses = [
        naive_loss(exact, sequences, objective, temperature=TEMPERATURE, old=old)
        for objective in (wide, narrow)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_parts_of_the_loss_and_logprobs_are_reported(policy, exact, sequences):
    objective = make_objective(tis_cap=2.0)
    batch = pack(sequences)
    result = policy(batch, joint_loss(objective, batch))
    policy_alone = naive_loss(
        exact, sequences, replace(objective, score_coef=0.0), temperature=TEMPERATURE
    )
    both = naive_loss(exact, sequences, objective, temperature=TEMPERATURE)
    torch.testing.assert_close(result.policy_loss.double(), policy_alone.detach())
    torch.testing.assert_close(
        result.score_loss.double(), (both - policy_alone).detach() / objective.score_coef
    )
    policy_rows, score_rows = [], []
    for sequence in sequences:
        rows, last = naive_logprobs(exact, sequence, temperature=TEMPERATURE)
        policy_rows.append(rows.gather(1, torch.tensor(sequence.completion_ids)[:, None])[:, 0])
        if sequence.score_at:
            score_rows.append(last[SCORE_TOKEN, None])
    expected = torch.cat([*policy_rows, *score_rows]).detach()
    torch.testing.assert_close(result.logprobs.double(), expected, rtol=1e-4, atol=1e-4)
    assert not any(x.requires_grad for x in result[1:])


@pytest.mark.parametrize("loss", [{}, {"kind": "gspo"}, {"entropy_coef": 0.05}], ids=str)
def test_score_rows_change_no_policy_row(policy, sequences, loss):
    without = [replace(sequence, score_at=None) for sequence in sequences]
    boundary = len(pack(sequences).policy)
    [with_rows], [without_rows] = (label_logprobs(policy, [pack(s)]) for s in (sequences, without))
    assert len(with_rows) > boundary == len(without_rows)
    torch.testing.assert_close(with_rows[:boundary], without_rows, rtol=0, atol=1e-6)

    # alpha = 0: loss and gradients of plain GRPO.
    objective = make_objective(score_coef=0.0, **loss)
    parameters = list(policy.parameters())
    losses, gradients = [], []
    for batch in (pack(sequences), pack(without)):
        result = policy(batch, joint_loss(objective, batch))
        losses.append(result.loss.detach())
        gradients.append(torch.autograd.grad(result.loss, parameters))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-7, atol=0)
    for got, want in zip(*gradients, strict=True):
        assert relative_error(got, want.double()) < 1e-6


def test_plain_grpo_needs_no_reference_logprob(policy, sequences):
    without = pack([replace(sequence, score_at=None) for sequence in sequences])
    unread = SelfScore(token_id=SCORE_TOKEN, beta=0.2, ref_logprob=float("nan"))
    result = policy(without, joint_loss(replace(make_objective(), score=unread), without))
    assert result.score_loss == 0
    assert result.loss.isfinite()


def test_an_empty_microbatch_gives_a_zero_loss_with_zero_gradients(policy):
    for loss in ({}, {"kind": "gspo"}, {"entropy_coef": 0.1}, {"kind": "cispo"}):
        batch = pack([])
        result = policy(batch, joint_loss(make_objective(**loss), batch))
        result.loss.backward()  # the rank must take part in the collectives of the backward
        assert result.loss == 0
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        assert gradients
        assert all((gradient == 0).all() for gradient in gradients)
        policy.zero_grad()
