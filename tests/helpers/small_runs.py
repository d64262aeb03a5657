"""What the small runs of tests/runs look like, and how they are read."""

import json
import math
import sys

import pytest

STEPS = 4
GROUPS, GROUP_SIZE = 6, 4

# Every optional part of a step at once; the plain configuration has the usual ones.
EXTRAS = {
    "data": {"train": "few.jsonl", "pass_rate": [0.3, 0.6]},
    "loss": {
        **{"kind": "gspo", "kl_coef": 0.1, "entropy_coef": 0.01, "clip_dual": 3.0},
        "importance": "sequence-truncate",
    },
    "optim": {"minibatches": 2, "epochs": 2, "tokens_per_microbatch": 80},
    "rollout": {"resample_rounds": 2, "score": "off", "temperature": 1.3, "max_num_seqs": 5},
    "reward": {"overlong": "mask"},
    "score": {"warmup_steps": 1, "ref_logprob": "floating", "beta": 0.9, "position": "last"},
    "advantage": {"scale": "none", "score_warmup_steps": 1},
}
LORA = EXTRAS | {"model": {"lora_rank": 4, "lora_alpha": 8.0}}
PLAIN_GRPO = {"score": {"loss_coef": 0.0}, "advantage": {"score_coef": 0.0}}


def make_model(folder):
    """A sandbox model after a short warm start, which only ends what it writes; its problems."""
    from laser_fast.log.jsonl import write_lines
    from laser_fast.sandbox.model import make_sandbox_model
    from laser_fast.sandbox.task import rows

    make_sandbox_model(folder, seed=0, steps=8)
    for split in ("train", "eval"):
        write_lines(folder / f"{split}.jsonl", rows(split, seed=0))
    write_lines(folder / "few.jsonl", rows("train", seed=0)[:8])  # a run has several epochs
    return folder


def write_config(model, folder, /, **sections):
    """Write the TOML of a small run on such a model into `folder`; returns its path."""
    import tomli_w

    from laser_fast.sandbox.task import RESERVED_TOKENS

    data = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(model)},
        "data": {
            "train": "train.jsonl",
            "eval": str(model / "eval.jsonl"),
            "eval_limit": 4,
            "eval_samples": 2,
            "template": "{prompt}",
            "max_prompt_tokens": 24,
            "prompts_per_step": GROUPS,
        },
        "rollout": {"max_new_tokens": 30, "group_size": GROUP_SIZE},
        "reward": {"kind": "train_ranks:reward", "workers": 1},
        "score": {
            "token": RESERVED_TOKENS[0],
            "beta": 0.2,
            "ref_logprob": -11.0,
            "loss_coef": 1.0,
            "max_grad_ratio": 1.0,
        },
        "advantage": {"score_min_std": 0.01},
        "optim": {"steps": STEPS, "lr": 5e-4, "schedule": "linear", "warmup_steps": 2},
        "checkpoint": {"every": 2, "keep": 9},
        "log": {"samples_per_step": GROUPS * GROUP_SIZE, "tensorboard": False},
    }
    for name, keys in sections.items():
        data[name] = {**data.get(name, {}), **keys} if isinstance(keys, dict) else keys
    train = data["data"]["train"]
    if isinstance(train, str) and train.endswith(".jsonl"):
        data["data"]["train"] = str(model / train)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(data))
    return path


def run_cli(monkeypatch, capsys, *arguments):
    """Exit code and standard error of the command line in this process."""
    from laser_fast import cli

    monkeypatch.setattr(sys, "argv", ["laser-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code, capsys.readouterr().err


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_metrics(run):
    """The metrics of every step but those that a clock or the host's memory gives."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/", "throughput/"))}
        for line in read_lines(run / "metrics.jsonl")
    ]


def assert_close_metrics(actual, expected, *, tolerance):
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        assert got.keys() == want.keys()
        for key, value in want.items():
            if key in ("pack/tokens", "pack/flop"):
                continue  # copies of a prompt depend on how groups are shared out
            close = pytest.approx(value, rel=tolerance, abs=1e-6) if value is not None else None
            assert got[key] == close, (want["step"], key)


def read_batch(path):
    """The sequences of an update that was dumped as bad; what was no number is nan."""
    from laser_fast.records import TrainingSequence

    def value(key, given):
        if isinstance(given, list):
            return tuple(math.nan if number is None else number for number in given)
        return math.nan if given is None and key != "score_at" else given

    return [
        TrainingSequence(**{key: value(key, line[key]) for key in line})
        for line in read_lines(path)
    ]
