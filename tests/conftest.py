"""What every test relies on: kernels interpreted without a GPU, a fixed seed, honest skips."""

import importlib.util
import os

import pytest
import torch

# Triton decides when @triton.jit runs, so this must come before any kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

NEEDS = {
    "gpu": (torch.cuda.is_available(), "needs an NVIDIA GPU"),
    "vllm": (importlib.util.find_spec("vllm") is not None, "needs vLLM"),
}


def pytest_collection_modifyitems(items):
    for item in items:
        for marker, (is_present, reason) in NEEDS.items():
            if item.get_closest_marker(marker) and not is_present:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
