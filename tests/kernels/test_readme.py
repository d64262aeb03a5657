"""The kernel card: its code runs, and what it replaces gives the same loss and gradients."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_the_replacements_equal_what_they_replace():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 3
    results = []
    for block in blocks:
        torch.manual_seed(0)
        lm_head = torch.nn.Linear(16, 97, bias=False)
        hidden_states = torch.randn(12, 16, requires_grad=True)
        namespace = {
            "torch": torch,
            "model": SimpleNamespace(lm_head=lm_head),
            "hidden_states": hidden_states,
            "labels": torch.randint(97, (12,)),
            "temperature": 0.7,
            "advantages": torch.randn(12),
            "old_logprobs": torch.randn(12) - 5,
        }
        exec(block, namespace)
        namespace["loss"].backward()
        results.append((namespace["loss"], hidden_states.grad, lm_head.weight.grad))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected)


def test_files_that_the_card_names_exist():
    for path in re.findall(r"`python (\S+\.py)`", README.read_text()):
        assert (README.parents[1] / path).exists()
