"""Records by the handful, a few-step sandbox model, and the real evaluation files if present."""

import json
import random
from pathlib import Path

import pytest

from laser_fast.evaluation.benchmarks import find_benchmark
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
def sandbox(tmp_path_factory):
    """The sandbox as a benchmark, with the problems of seed 0."""
    from laser_fast.sandbox.task import rows

    file = tmp_path_factory.mktemp("sandbox") / "eval.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows("eval", seed=0)))
    return find_benchmark("sandbox", files={"sandbox": file})


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
    from tiny_models import save_model

    folder = tmp_path_factory.mktemp("model") / "random"
    save_model(folder, hidden_size=16, num_hidden_layers=1, max_position_embeddings=4096)
    return folder
