"""The readable twin of the trainer: its loss is the paper's, and it learns."""

import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from laser_fast import minimal
from laser_fast.sandbox.model import make_sandbox_model
from laser_fast.sandbox.task import rows


@pytest.fixture(scope="module")
def batch_of_a_model(tmp_path_factory):
    """A model after a short warm start, and a rollout, partly cut off, with rewards of the dice."""
    folder = tmp_path_factory.mktemp("sandbox") / "model"
    make_sandbox_model(folder, seed=0, steps=20)
    model = Qwen2ForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimal, "MAX_NEW_TOKENS", 14)
        batch = minimal.sample(model, tokenizer, rows("train", seed=0)[:4], minimal.G)
    rewards = torch.randint(2, batch.rewards.shape).float()
    rewards[: minimal.G] = 1.0  # a group without spread
    return model, batch._replace(rewards=rewards)


def test_a_rollout_says_where_its_answers_are(batch_of_a_model):
    _, batch = batch_of_a_model
    assert 0 < batch.is_end.sum() < len(batch.ids)
    assert not (batch.ids[batch.is_sampled] == minimal.Z_C).any()
    for ids, is_text, is_sampled, is_end in zip(*batch[:4], strict=True):
        first = is_text.nonzero()[0].item()
        last = is_text.nonzero()[-1].item()
        assert is_text[first : last + 1].all() and is_sampled[last]
        eos = (ids == 1).nonzero().flatten().tolist()
        assert is_end.nonzero().flatten().tolist() == eos[:1] == ([last] if eos else [])
        assert not is_sampled[first:10].any()  # the shortest problem has eleven tokens


@pytest.mark.parametrize("mixes", [False, True])
def test_the_loss_has_the_gradient_of_a_naive_one(batch_of_a_model, mixes, monkeypatch):
    monkeypatch.setattr(minimal, "BETA", 1.0)  # scores that spread without training
    model, batch = batch_of_a_model
    c_ref = -6.0
    minimal.laser_loss(model, batch, c_ref, mixes=mixes).backward()
    actual = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    # One unpadded row at a time, from full logits.
    logprobs, scores = [], torch.zeros(len(batch.ids))
    for row, (ids, is_text, is_sampled, is_end) in enumerate(zip(*batch[:4], strict=True)):
        logp = model(input_ids=ids[is_text][None]).logits[0].log_softmax(1)
        labels = is_sampled[is_text].nonzero().flatten()
        logprobs.append(logp[labels - 1, ids[is_text][labels]])
        if is_end.any():
            scores[row] = minimal.BETA * (logp[-1, minimal.Z_C] - c_ref)
    rewards, is_finished = batch.rewards, batch.is_end.any(dim=1)

    def standardized(values):
        groups = values.view(-1, minimal.G)
        centered = groups - groups.mean(1, keepdim=True)
        return (centered / (groups.std(1, keepdim=True) + 1e-6)).flatten()

    advantages = standardized(rewards)
    if mixes:
        clamped = scores.detach().clamp(0, 1)
        has_spread = clamped.view(-1, minimal.G).std(1) > 0.1
        mixed = 0.9 * advantages + 0.1 * standardized(clamped)
        advantages = torch.where(has_spread.repeat_interleave(minimal.G), mixed, advantages)
        assert has_spread.any()
    num_tokens = sum(map(len, logprobs))
    loss = -sum(a * part.sum() for a, part in zip(advantages, logprobs, strict=True)) / num_tokens
    for members in (rewards > 0.5, rewards <= 0.5):
        members &= is_finished
        loss = loss + minimal.ALPHA * ((scores - rewards)[members] ** 2).mean() / 2
    loss.backward()
    for found, parameter in zip(actual, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5)
    model.zero_grad()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_it_learns_to_solve_and_to_grade_itself():
    """With one thread, since two that wait for each other crawl on a busy machine."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "laser_fast.minimal"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "weights" not in done.stderr
    found = re.findall(r"^(before|after): reward (\S+), auroc (\S+)$", done.stdout, re.MULTILINE)
    (_, before, _), (_, after, auroc) = found
    assert float(after) - float(before) >= 0.15
    assert float(auroc) >= 0.75
