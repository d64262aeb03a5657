"""The supervised loss equals plain cross-entropy, however rows are packed."""

from types import SimpleNamespace

import pytest
import torch
from policy_ranks import MODEL_CASES
from tiny_models import EOS, make_model
from torch.nn.functional import cross_entropy

from laser_fast.config import ModelConfig
from laser_fast.model.distributed import World
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy
from laser_fast.training.sft import SftTrainer, supervised_loss, supervised_sequences

# Prompts that repeat, responses of one token, and one that goes on after its EOS.
ROWS = [
    ((7, 8, 9), (11, 12, 13, EOS)),
    ((7, 8, 9), (EOS,)),
    ((10,), (20, 21, EOS, 4)),
    ((7, 8, 9), (14, 15, EOS)),
    ((30, 31, 32, 33, 34), (40, EOS)),
    ((35, 36), (41, 42, 43, 44, 45, EOS)),
]


@pytest.fixture(scope="module", params=["qwen2-tied", "llama-untied"])
def case(request, world, model_folders):
    """The policy, and loss and gradients of the same model from all logits in float64."""
    policy = build_policy(ModelConfig(path=str(model_folders / request.param)), world)
    family, tied = MODEL_CASES[request.param]
    exact = make_model(family, tie_word_embeddings=tied).double()
    logits, labels = [], []
    for prompt, response in ROWS:
        logits.append(exact(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1])
        labels += response
    loss = cross_entropy(torch.cat(logits), torch.tensor(labels))
    loss.backward()
    return policy, loss.detach(), {name: p.grad for name, p in exact.named_parameters()}


@pytest.mark.parametrize("budget", [8, 200])
@pytest.mark.parametrize("order", [1, -1])
def test_loss_and_gradients_are_those_of_cross_entropy(case, world, budget, order):
    policy, exact, gradients = case
    packer = Packer(
        budget=budget, score_token_id=0, score_at="eos", temperature=1.0, device=world.device
    )
    batches = packer.microbatches(supervised_sequences(ROWS[::order], world))
    assert (len(batches) > 1) == (budget == 8)
    if budget == 200:  # a prompt that repeats is computed once
        assert len(batches[0].input_ids) == 3 + 3 + 2 + 1 + 3 + 5 + 1 + 2 + 5
    policy.zero_grad()
    losses = []
    for batch in batches:
        losses.append(supervised_loss(policy, batch)[0])
        (3 * losses[-1]).backward()
    torch.testing.assert_close(sum(losses).double(), exact, rtol=1e-6, atol=0)
    for name, parameter in policy.hf.named_parameters():
        want = 3 * gradients[name]
        error = (parameter.grad.full_tensor().double() - want).norm() / want.norm()
        assert error < 1e-5, name


def test_ranks_share_the_rows_and_the_denominator():
    shares = [supervised_sequences(ROWS, World(rank, 3, torch.device("cpu"))) for rank in range(3)]
    found = [(s.prompt_ids, s.completion_ids) for share in shares for s in share]
    assert sorted(found) == sorted(ROWS)
    assert {s.token_weight for share in shares for s in share} == {1 / 20}


def test_more_ranks_than_rows_leave_some_without():
    shares = [
        supervised_sequences(ROWS[:1], World(rank, 2, torch.device("cpu"))) for rank in (0, 1)
    ]
    assert sorted(map(len, shares)) == [0, 1]


def test_a_response_ends_once():
    ids = [[5], [5, 1], [5, 3], [6, 3, 5, 1, 2], []]
    trainer = SimpleNamespace(
        _tokenizer=lambda texts, **_: {"input_ids": ids}, _eos=1, _ends=(1, 3)
    )
    expected = [(5, 1), (5, 1), (5, 3), (6, 3), (1,)]
    assert SftTrainer._encode(trainer, ["of these ids"]) == expected
