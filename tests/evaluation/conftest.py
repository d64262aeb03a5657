"""Records by the handful, a few-step sandbox model, and the real evaluation files if present."""

import random
from pathlib import Path

import pytest

from laser_fast.log.samples import SampleRecord

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def data_dir():
    if not DATA.is_dir():
        pytest.skip("the real evaluation files are not there")
    return DATA


@pytest.fixture(scope="session")
def sandbox_model(tmp_path_factory):
    """A sandbox model after 20 steps of its warm start: it ends its answers, mostly wrong ones."""
    from laser_fast.sandbox.model import make_sandbox_model

    folder = tmp_path_factory.mktemp("model") / "sandbox"
    make_sandbox_model(folder, seed=0, steps=20)
    return folder


@pytest.fixture(scope="session")
def make_record():
    def make(prompt_id, sample, **fields):
        known = {
            "prompt": "?",
            "gold": "1",
            "text": "",
            "answer": "1",
            "reward": 1.0,
            "score": 0.5,
            "score_logprob": -15.0,
            "finish_reason": "stop",
            "num_tokens": 3,
        }
        return SampleRecord(prompt_id=prompt_id, sample=sample, **(known | fields))

    return make


@pytest.fixture(scope="session")
def random_records(make_record):
    """A function (problems, samples, seed) to records whose scores tell something, with ties."""

    def make(num_problems, num_samples, seed=0):
        rng = random.Random(seed)
        records = []
        for p in range(num_problems):
            ease = rng.random()
            for sample in range(num_samples):
                is_correct, is_finished = rng.random() < ease, rng.random() < 0.9
                score = round(rng.gauss(0.7 if is_correct else 0.4, 0.3), 1)
                records.append(
                    make_record(
                        f"p{p}",
                        sample,
                        answer="1" if is_correct else rng.choice(["2", "3", None]),
                        reward=float(is_correct),
                        score=score if is_finished else 0.0,
                        score_logprob=-20 + 10 * score if is_finished else None,
                        finish_reason="stop" if is_finished else "length",
                        num_tokens=rng.randint(3, 9),
                    )
                )
        return records

    return make


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """A random model with the sandbox's tokenizer and room for real problems."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from laser_fast.sandbox.task import EOS_TOKEN, TOKENS, write_tokenizer

    folder = tmp_path_factory.mktemp("model") / "random"
    write_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=len(TOKENS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=TOKENS.index(EOS_TOKEN),
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder
