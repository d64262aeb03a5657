"""Five steps whose losses and gradient norms are in git: a refactor may not move them.

The rollout is written down instead of sampled and the weights are a formula, so that nothing but
rounding differs between machines. A change of the algorithm regenerates the files, in the same
commit, by

    PYTHONPATH=tests/helpers python tests/test_golden_run.py
"""

import json
import random
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from tiny_models import save_model

from laser_fast.algorithm.score import SelfScore
from laser_fast.config import Config
from laser_fast.data.prompts import train_prompts
from laser_fast.log.jsonl import write_lines
from laser_fast.log.timer import StageTimer
from laser_fast.model.distributed import open_world, stop_at_sigterm
from laser_fast.model.packing import Packer
from laser_fast.model.policy import build_policy, load_model_config
from laser_fast.model.vocabulary import load_vocabulary
from laser_fast.records import Completion, Group
from laser_fast.rewards import Grader
from laser_fast.sandbox.task import EOS_TOKEN, RESERVED_TOKENS, rows
from laser_fast.training.sampler import Sampler
from laser_fast.training.schedule import GradientCap
from laser_fast.training.trainer import Trainer
from laser_fast.training.update import build_optimizer

GOLDEN = Path(__file__).parent / "golden"
PINNED = ("loss/policy", "loss/score", "step/grad_norm")
STEPS = 5
CASES = {
    # Score rows from the first step, their loss from the second, mixed advantages from the third.
    "laser": {
        "score": {"warmup_steps": 1, "max_grad_ratio": 0.5},
        "advantage": {"score_warmup_steps": 1, "score_min_std": 0.0, "score_coef": 0.2},
    },
    # Clipping and importance sampling in the second update of each step.
    "grpo": {
        "score": {"loss_coef": 0.0},
        "advantage": {"score_coef": 0.0},
        "loss": {"clip_low": 0.02, "clip_high": 0.03},
        "optim": {"minibatches": 2},
    },
}


def make_config(folder, case):
    sections = {
        "output_dir": "run",
        "model": {"path": str(folder)},
        "data": {
            "train": str(folder / "train.jsonl"),
            "template": "{prompt}",
            "max_prompt_tokens": 24,
            "prompts_per_step": 4,
        },
        "rollout": {"max_new_tokens": 16, "group_size": 4, "max_disagreement": 100.0},
        "reward": {"kind": "sandbox", "workers": 1},
        "score": {"token": RESERVED_TOKENS[0], "beta": 0.2, "ref_logprob": -9.0},
        "optim": {"steps": STEPS, "lr": 2e-3, "schedule": "linear", "tokens_per_microbatch": 100},
    }
    for name, keys in CASES[case].items():
        sections[name] = {**sections.get(name, {}), **keys}
    return Config.parse(sections, source="golden")


@torch.no_grad()
def write_sine(model):
    for index, (name, parameter) in enumerate(model.named_parameters()):
        places = torch.arange(parameter.numel(), dtype=torch.float64)
        values = 0.4 * torch.sin(places * (1.1 + 0.37 * index) + index)
        parameter.copy_(values.view_as(parameter) + float("norm" in name))


def write_model(folder):
    """A model of two layers whose weights are values of the sine."""
    sizes = {"hidden_size": 16, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    save_model(folder, "qwen2", adapt=write_sine, **sizes, **heads, pad_token_id=None)
    write_lines(folder / "train.jsonl", rows("train", seed=0))


class WrittenRollout:
    """An engine that samples nothing: right, wrong and truncated answers by a table of dice."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def sync(self, weights):
        """There are no weights to take."""

    def sleep(self):
        """There is nothing to give back."""

    def generate(self, prompts, sampling):
        return [
            Group(
                prompt=prompt,
                completions=tuple(
                    self.write(
                        prompt, random.Random(f"{sampling.seed}/{prompt.prompt_id}/{member}")
                    )
                    for member in range(sampling.group_size)
                ),
            )
            for prompt in prompts
        ]

    def write(self, prompt, rng):
        is_finished = rng.random() < 0.8
        answer = prompt.answer if rng.random() < 0.5 else str(rng.randrange(10))
        work = "".join(rng.choice("0123456789+*=") for _ in range(rng.randint(1, 9)))
        text = f"{work}\\boxed{{{answer}}}{EOS_TOKEN}" if is_finished else work
        ids = self.tokenizer(text)["input_ids"]
        return Completion(
            completion_ids=tuple(ids),
            rollout_logprobs=tuple(rng.uniform(-4.5, -2.5) for _ in ids),
            finish_reason="stop" if is_finished else "length",
            score_logprob=rng.uniform(-9.0, -4.0) if is_finished else None,
        )


def run(case):
    """The pinned metrics of every step."""
    with TemporaryDirectory() as name, open_world() as world, ExitStack() as stack:
        folder = Path(name)
        write_model(folder)
        config = make_config(folder, case)
        vocabulary = load_vocabulary(
            name, score_token=config.score.token, model_config=load_model_config(config.model)
        )
        policy = build_policy(config.model, world)
        stage = StageTimer(after_stage=stack.enter_context(stop_at_sigterm(world)))
        packer = Packer(
            budget=config.optim.tokens_per_microbatch,
            score_token_id=vocabulary.special.score_token_id,
            score_at="eos",
            temperature=config.rollout.temperature,
            device=world.device,
        )
        sampler = Sampler(
            config=config,
            world=world,
            stage=stage,
            vocabulary=vocabulary,
            prompts=train_prompts(config.data, vocabulary.tokenizer, seed=0),
            engine=WrittenRollout(vocabulary.tokenizer),
            grader=stack.enter_context(Grader(config.reward)),
            policy=policy,
            packer=packer,
        )
        trainer = Trainer(
            sampler=sampler,
            reference=None,
            optimizer=build_optimizer(policy, config.optim),
            cap=GradientCap(
                loss_coef=config.score.loss_coef, max_ratio=config.score.max_grad_ratio
            ),
            score=SelfScore(
                token_id=vocabulary.special.score_token_id,
                beta=config.score.beta,
                ref_logprob=config.score.ref_logprob,
            ),
        )
        metrics = [trainer.step(step)[0] for step in range(STEPS)]
    return [{key: line[key] for key in PINNED} for line in metrics]


@pytest.mark.parametrize("case", CASES)
def test_golden_run(case, recwarn):
    expected = json.loads((GOLDEN / f"{case}.json").read_text())
    found = run(case)
    assert len(found) == len(expected) == STEPS
    for step, (got, want) in enumerate(zip(found, expected, strict=True)):
        for key in PINNED:
            assert got[key] == pytest.approx(want[key], rel=1e-5, abs=1e-7), (step, key)
    # Its score.ref_logprob is not this model's; without a score nobody reads it.
    assert (case == "laser") == any("scores start at" in str(w.message) for w in recwarn)


def write_golden_files():
    for case in CASES:
        lines = ",\n".join(json.dumps(line) for line in run(case))
        (GOLDEN / f"{case}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    write_golden_files()
