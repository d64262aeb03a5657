"""A tiny model with everything that a vLLM engine must respect, and one engine for all tests.

Random and peaked, so that stale weights, bans and scores all show: tied embeddings, two EOS ids,
biases, a head with padding rows beyond the tokenizer's vocabulary.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

HAS_VLLM = importlib.util.find_spec("vllm") is not None


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="vLLM is not installed; see the README for its CPU build")
    for item in items:
        if item.get_closest_marker("vllm") and not HAS_VLLM:
            item.add_marker(skip)


@dataclass(frozen=True)
class Tiny:
    """A Hugging Face model in float32, its folder and its ids."""

    path: Path
    model: torch.nn.Module

    eos: ClassVar = (2, 3)
    score_token: ClassVar = 7
    vocab: ClassVar = 120  # of the tokenizer; the head has 8 rows more
    max_model_len: ClassVar = 160

    @classmethod
    def make(cls, path, *, seed=0, tied=True):
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=cls.vocab + 8,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,  # a head dimension of 32, the smallest of the CPU attention
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            eos_token_id=list(cls.eos),
            initializer_range=0.15,
        )
        model = Qwen2ForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # Qwen2 starts them at zero, where a lost one shows nowhere
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(path)
        return cls(path, model)

    def weights(self):
        """Every state_dict entry, as a policy streams it."""
        return iter(self.model.state_dict().items())

    @torch.no_grad()
    def logprobs(self, prompt_ids, completion_ids, temperature=1.0):
        """Log-probs [n + 1, V] at the rows that predict each completion id and what follows."""
        ids = torch.tensor([[*prompt_ids, *completion_ids]])
        logits = self.model(ids).logits[0, len(prompt_ids) - 1 :]
        return (logits.double() / temperature).log_softmax(-1)

    def token_logprobs(self, groups, temperature=1.0):
        """What an engine's `token_logprobs` should say."""
        return [
            self.logprobs(group.prompt.prompt_ids, completion.completion_ids, temperature)[:-1]
            .gather(1, torch.tensor(completion.completion_ids)[:, None])[:, 0]
            .tolist()
            for group in groups
            for completion in group.completions
        ]

    def score_logprob(self, group, completion):
        """log pi(z_c | x, y) at the EOS row."""
        rows = self.logprobs(group.prompt.prompt_ids, completion.completion_ids)
        return rows[-1, self.score_token].item()

    def engine(self, **rollout):
        from laser_fast.config import RolloutConfig
        from laser_fast.rollout.vllm import VllmEngine

        options = {"engine": "vllm", "max_new_tokens": 32, "max_num_seqs": 64}
        return VllmEngine(
            str(self.path),
            RolloutConfig(**{**options, **rollout}),
            score_token_id=self.score_token,
            eos_token_ids=self.eos,
            vocab_size=self.vocab,
            max_model_len=self.max_model_len,
        )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return Tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shared_engine(tiny):
    engine = tiny.engine()
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine, tiny):
    """The shared engine, holding the tiny model's weights."""
    shared_engine.sync(tiny.weights())
    return shared_engine
