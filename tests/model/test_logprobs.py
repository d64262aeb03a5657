"""Log-probs after the last token of packed sequences against full logits, one at a time."""

import pytest
import torch
from tiny_models import make_model

from laser_fast.config import ModelConfig
from laser_fast.model.distributed import open_world
from laser_fast.model.logprobs import last_token_logprobs
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy

SEQUENCES = [(7, 8, 9, 1), (10,), (11, 12, 13, 14, 15, 16, 1), (7, 9, 1), (20, 21, 22, 23, 1)]
TOKENS = [3, 2, 6, 5]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    with open_world() as world:
        yield build_policy(ModelConfig(path=str(folder)), world)


def _packer(budget):
    return Packer(budget=budget, score_token_id=4, temperature=0.5, device=torch.device("cpu"))


@pytest.mark.parametrize("budget", [7, 10, 64])  # alone, in pairs, together
def test_every_token_after_every_sequence(policy, budget):
    found = last_token_logprobs(policy, SEQUENCES, _packer(budget), TOKENS)
    model = make_model().double()
    for ids, row in zip(SEQUENCES, found, strict=True):
        exact = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[TOKENS]
        torch.testing.assert_close(row.double(), exact, atol=2e-5, rtol=0)


def test_no_sequence_at_all(policy):
    assert last_token_logprobs(policy, [], _packer(8), TOKENS).shape == (0, 4)
