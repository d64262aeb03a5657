"""The page of the integrations: its snippets run, and give what plain float64 logits give."""

import copy
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from snippets import snippet
from tiny_models import make_model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "laser_fast" / "integrations" / "README.md"
B, S, VOCAB = 4, 9, 97


@pytest.fixture
def model():
    return make_model(tie_word_embeddings=False)


@pytest.fixture
def ids():
    return torch.randint(6, VOCAB, (B, S))


@pytest.fixture
def is_answer():
    return torch.arange(S)[None] >= torch.tensor([3, 2, 4, 1])[:, None]


def exact(model, ids, temperature=1.0):
    """The model in float64 and the log-probs of the tokens after each, [B, S - 1, V]."""
    model = copy.deepcopy(model).double()
    return model, (model(ids).logits[:, :-1] / temperature).log_softmax(-1)


def chosen(table, ids):
    return table.gather(-1, ids[:, 1:, None])[..., 0]


def assert_same(loss, model, expected, exact_model):
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), exact_model.parameters(), strict=True):
        error = (p.grad.double() - q.grad).norm() / q.grad.norm()
        assert error < 1e-5, name


def test_sft(model, ids, is_answer):
    labels = ids.masked_fill(~is_answer, -100)
    loss = snippet("SFT")["sft_loss"](model, ids, labels)
    exact_model, table = exact(model, ids)
    expected = -chosen(table, ids)[is_answer[:, 1:]].mean()
    assert_same(loss, model, expected, exact_model)


def test_dpo(model, ids, is_answer):
    reference = make_model(seed=1, tie_word_embeddings=False)
    loss = snippet("DPO")["dpo_loss"](model, reference, ids, is_answer, beta=0.3)
    exact_model, table = exact(model, ids)
    of_reference = exact(reference, ids)[1].detach()
    gap = ((chosen(table, ids) - chosen(of_reference, ids)) * is_answer[:, 1:]).sum(1)
    expected = -(0.3 * (gap[:2] - gap[2:])).sigmoid().log().mean()
    assert_same(loss, model, expected, exact_model)


def test_grpo(model, ids, is_answer):
    exact_model, table = exact(model, ids, 0.7)
    logprobs, advantages = chosen(table, ids), torch.tensor([1.0, -0.5, 0.3, -1.2])
    old = (logprobs + 0.3 * torch.randn(logprobs.shape)).detach().float()
    grpo_loss = snippet("GRPO")["grpo_loss"]
    loss = grpo_loss(model, ids, is_answer, old, advantages, temperature=0.7)
    ratio, weight = (logprobs - old).exp(), advantages[:, None].double()
    gain = torch.minimum(ratio * weight, ratio.clamp(0.8, 1.2) * weight)
    rows = is_answer[:, 1:]
    assert_same(loss, model, -(gain * rows).sum() / rows.sum(), exact_model)


def test_laser(model, ids):
    last, rewards = torch.tensor([8, 5, 7, 8]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    hidden = model.model(ids).last_hidden_state
    loss, scores = snippet("LaSeR")["score_loss"](
        model, hidden, last, rewards, token_id=5, ref_logprob=-6.0
    )
    exact_model = copy.deepcopy(model).double()
    table = exact_model(ids).logits.log_softmax(-1)
    expected_scores = 0.1 * (table[range(B), last, 5] + 6)
    torch.testing.assert_close(scores.double(), expected_scores, atol=1e-5, rtol=1e-5)
    assert_same(loss, model, ((expected_scores - rewards) ** 2).mean(), exact_model)


def test_on_policy_distillation(model, ids, is_answer):
    teacher, rows = make_model(seed=1, tie_word_embeddings=False), is_answer[:, 1:]
    loss = snippet("Distillation", 0)["on_policy_distillation_loss"](model, teacher, ids, is_answer)
    exact_model, table = exact(model, ids)
    student = chosen(table, ids)[rows]
    advantages = chosen(exact(teacher, ids)[1], ids)[rows] - student
    assert_same(loss, model, -(advantages.detach() * student).mean(), exact_model)


def test_top_k_distillation(model, ids):
    top = torch.randn(B * (S - 1), VOCAB).log_softmax(1).topk(5)
    hidden = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    loss = snippet("Distillation", 1)["top_k_distillation_loss"](
        hidden, model.lm_head.weight, top.indices, top.values
    )
    exact_model, table = exact(model, ids)
    student, teacher = table.flatten(0, 1).gather(1, top.indices), top.values.double()
    expected = (teacher.exp() * (teacher - student)).sum(1).mean()
    assert_same(loss, model, expected, exact_model)


@pytest.fixture(scope="module")
def two_ranks():
    """What two ranks find in the snippets of FSDP2 and tensor parallelism: rank 0's errors."""
    command = [sys.executable, ROOT / "tests" / "helpers" / "snippets.py"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    return dict(re.findall(r"^(\w+) ([\d.e+-]+)$", shown, re.M))


def test_fsdp2_has_the_gradients_of_one_process(two_ranks):
    assert float(two_ranks["fsdp2"]) < 1e-5


def test_tensor_parallel_has_the_gradients_of_one_process(two_ranks):
    assert float(two_ranks["tensor_parallel"]) < 1e-5


def test_the_page_names_what_exists():
    text = PAGE.read_text()
    for path in re.findall(r"\]\(((?:\.\./)+[^)#]+)\)", text):
        assert (PAGE.parent / path).exists(), path
    headings = {line.strip("# ").lower().replace(" ", "-") for line in text.splitlines()}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in headings


def test_numbers_of_the_tables_are_those_of_the_results():
    blocks, checked = PAGE.read_text().split("\n\n"), 0
    for before, table in itertools.pairwise(blocks):
        link = re.search(r"\]\((\S+/results/\S+\.md)\)", before)
        if link and table.startswith("|"):
            numbers = re.findall(r"(?<=\| )[\d.]+(?:e-\d+)?(?= \|)", table)
            results = (PAGE.parent / link[1]).read_text()
            assert [number for number in numbers if f"| {number} |" not in results] == []
            checked += len(numbers)
    assert checked > 20


def test_imports_of_the_page_exist():
    text = PAGE.read_text()
    for module, names in re.findall(r"^from (laser_\S+) import (.+)$", text, re.M):
        path = (
            ROOT
            / ("kernels" if module.startswith("laser_kernels") else "")
            / Path(*module.split("."))
        )
        source = (
            path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        )
        for name in names.split(", "):
            assert re.search(rf"\b{name}\b", source.read_text()), f"{module}: {name}"
