"""Log-probs after the last token of packed sequences against full logits, one at a time."""

import pytest
import torch
from tiny_models import make_group, make_model

from laser_fast.config import ModelConfig
from laser_fast.model.logprobs import last_token_logprobs, policy_logprobs, with_scores
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy

SEQUENCES = [(7, 8, 9, 1), (10,), (11, 12, 13, 14, 15, 16, 1), (7, 8, 1), (20, 21, 22, 23, 1)]
TOKENS = [3, 2, 6, 5]


@pytest.fixture(scope="module")
def policy(world, model_folders):
    return build_policy(ModelConfig(path=str(model_folders / "qwen2-tied")), world)


@pytest.fixture(scope="module")
def exact():
    return make_model("qwen2").double()


def make_packer(budget, score_at):
    device = torch.device("cpu")
    return Packer(
        budget=budget, score_token_id=4, score_at=score_at, temperature=0.5, device=device
    )


@pytest.mark.parametrize("budget", [1, 7, 10, 64])  # one by one, in pairs, together
@pytest.mark.parametrize(("score_at", "place"), [("eos", -1), ("last", -2)])
def test_every_token_at_the_end_of_every_sequence(policy, exact, world, budget, score_at, place):
    given = [ids for ids in SEQUENCES if len(ids) >= -place]
    pairs = [(ids[:2], ids[2:]) for ids in given]  # two with one prompt
    found = last_token_logprobs(policy, pairs, TOKENS, world, score_at=score_at, budget=budget)
    for ids, row in zip(given, found, strict=True):
        expected = exact(torch.tensor([ids])).logits[0, place].log_softmax(-1)[TOKENS]
        torch.testing.assert_close(row.double(), expected, atol=2e-5, rtol=0)


def test_no_sequence_at_all(policy, world):
    assert last_token_logprobs(policy, [], TOKENS, world, score_at="eos", budget=8).shape == (0, 4)


@pytest.mark.parametrize("budget", [13, 64])
@pytest.mark.parametrize(("score_at", "place"), [("eos", -1), ("last", -2)])
def test_tokens_are_read_at_the_sampling_temperature_and_scores_at_one(
    policy, exact, world, budget, score_at, place
):
    packer = make_packer(budget, score_at)
    groups = [
        make_group("a", [(3, True, None), (10, False, None)]),
        make_group("b", [(1, True, None)]),
    ]
    completions = [(g.prompt, c) for g in groups for c in g.completions]
    found = policy_logprobs(policy, groups, packer)
    for (prompt, completion), (tokens, score) in zip(completions, found, strict=True):
        ids = torch.tensor(completion.completion_ids)
        logits = exact(torch.tensor([prompt.prompt_ids + completion.completion_ids])).logits[0]
        rows = (logits[len(prompt.prompt_ids) - 1 : -1] / 0.5).log_softmax(-1)
        expected = rows.gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(tokens).double(), expected, atol=5e-5, rtol=0)
        assert (score is not None) == completion.is_finished
        if score is not None:
            assert score == pytest.approx(logits[place].log_softmax(-1)[4].item(), abs=2e-5)
    scored = [c for g in with_scores(policy, groups, packer, world) for c in g.completions]
    scores = pytest.approx([score for _, score in found], abs=1e-5)
    assert [c.score_logprob for c in scored] == scores
