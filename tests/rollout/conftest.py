"""A tiny model with everything that a vLLM engine must respect, and one engine for all tests.

Random and peaked, so that stale weights, bans and scores all show: tied embeddings, two EOS ids,
a head with padding rows beyond the tokenizer's vocabulary.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

HAS_VLLM = importlib.util.find_spec("vllm") is not None
EOS = (2, 3)
SCORE_TOKEN = 7
VOCAB = 120  # of the tokenizer; the head has 8 rows more
MAX_MODEL_LEN = 160


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="vLLM is not installed; see the README for its CPU build")
    for item in items:
        if item.get_closest_marker("vllm") and not HAS_VLLM:
            item.add_marker(skip)


@dataclass(frozen=True)
class Tiny:
    """A Hugging Face model in float32 and its folder."""

    path: Path
    model: torch.nn.Module

    def weights(self):
        """Every state_dict entry, as a policy streams it."""
        return iter(self.model.state_dict().items())

    @torch.no_grad()
    def logprobs(self, prompt_ids, completion_ids, temperature=1.0):
        """Log-probs [n + 1, V] at the rows that predict each completion id and what follows."""
        ids = torch.tensor([[*prompt_ids, *completion_ids]])
        logits = self.model(ids).logits[0, len(prompt_ids) - 1 :]
        return (logits.double() / temperature).log_softmax(-1)


def make_tiny(path, *, seed=0, tied=True, layers=2):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB + 8,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,  # a head dimension of 32, the smallest of the CPU attention
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=list(EOS),
        initializer_range=0.15,
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # Qwen2 starts them at zero, where a lost one would not show
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return Tiny(path, model)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def start_engine(tiny, **rollout):
    from laser_fast.config import RolloutConfig
    from laser_fast.rollout.vllm import VllmEngine

    options = {"engine": "vllm", "max_new_tokens": 32, "max_num_seqs": 64}
    return VllmEngine(
        str(tiny.path),
        RolloutConfig(**{**options, **rollout}),
        score_token_id=SCORE_TOKEN,
        eos_token_ids=EOS,
        vocab_size=VOCAB,
        max_model_len=MAX_MODEL_LEN,
    )


@pytest.fixture(scope="session")
def engine(tiny):
    """An engine with the tiny model's weights; tests that change them sync them back."""
    engine = start_engine(tiny)
    engine.sync(tiny.weights())
    yield engine
    engine.close()
