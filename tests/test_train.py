"""Whole runs from a configuration file, on any number of ranks: resumed, stopped, refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_fast import cli
from laser_fast.config import ConfigError, load_config
from laser_fast.data.prompts import PromptSource
from laser_fast.data.sandbox import EOS_TOKEN, RESERVED_TOKENS
from laser_fast.records import Sampling
from laser_fast.rollout.engine import draw_seed
from laser_fast.rollout.hf import HfEngine
from laser_fast.training.checkpoint import latest_checkpoint, load_checkpoint
from laser_fast.training.distributed import open_world
from laser_fast.training.export import export
from laser_fast.training.optimizer import build_optimizer
from laser_fast.training.packing import Packer
from laser_fast.training.policy import build_policy
from laser_fast.training.reading import read_completions
from laser_fast.training.run import train
from laser_fast.training.warm_start import make_sandbox_model

HELPERS = Path(__file__).parent / "helpers"
STEPS = 4
GROUPS, GROUP_SIZE = 6, 4

# Every optional part of a step at once; the plain configuration has the usual ones.
EXTRAS = {
    "loss": {"kind": "gspo", "kl_coef": 0.1, "entropy_coef": 0.01, "clip_dual": 3.0},
    "optim": {"minibatches": 2, "tokens_per_microbatch": 80},
    "rollout": {"resample_rounds": 2, "score": "off", "temperature": 1.3, "max_num_seqs": 5},
    "reward": {"overlong": "mask"},
    "score": {"warmup_steps": 1, "ref_logprob": "auto", "beta": 0.9},
    "advantage": {"scale": "none", "score_warmup_steps": 1},
}
PLAIN_GRPO = {"score": {"loss_coef": 0.0}, "advantage": {"score_coef": 0.0}}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A sandbox model after a short warm start: it ends what it writes, and little more."""
    folder = tmp_path_factory.mktemp("sandbox") / "model"
    make_sandbox_model(folder, seed=0, steps=8)
    return folder


@pytest.fixture(scope="session", autouse=True)
def user_module():
    """Makes the reward function importable, as a user's module in the working folder would be."""
    sys.path.append(str(HELPERS))
    yield
    sys.path.remove(str(HELPERS))


@pytest.fixture(scope="session")
def write_config(model):
    """A function that writes the TOML of a small run into `folder`, and returns its path."""

    def write(folder, **sections):
        data = {
            "output_dir": str(folder / "run"),
            "model": {"path": str(model)},
            "data": {
                "train": "sandbox",
                "eval": "sandbox",
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
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.toml"
        path.write_text(tomli_w.dumps(data))
        return path

    return write


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory, write_config):
    """Folder of the plain run and of the one with every extra, on one rank."""
    folder = tmp_path_factory.mktemp("one-rank")
    train(load_config(write_config(folder / "plain")))
    train(load_config(write_config(folder / "extras", **EXTRAS)))
    return folder


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, write_config):
    """The same two runs on two ranks, packed otherwise, and one that cannot be shared out."""
    folder = tmp_path_factory.mktemp("two-ranks")
    configs = [
        write_config(folder / "plain", optim={"tokens_per_microbatch": 120}),
        write_config(folder / "extras", **EXTRAS),
        write_config(folder / "odd", data={"prompts_per_step": 5}),
    ]
    command = [sys.executable, HELPERS / "train_ranks.py", *configs]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


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
            close = pytest.approx(value, rel=tolerance, abs=1e-6) if value is not None else None
            assert got[key] == close, (want["step"], key)


@pytest.mark.parametrize("name", ["plain", "extras"])
def test_runs_are_not_trivial(one_rank, name):
    """What follows compares something: spread, scores, several updates that change the policy."""
    lines = read_metrics(one_rank / name / "run")
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(0 < line["reward/mean"] < 1 for line in lines)
    assert all(line["advantage/zero_std_groups"] < 0.7 for line in lines)
    assert all(line["step/grad_norm"] > 0.01 for line in lines)
    assert len({line["score/mean_correct"] for line in lines}) == STEPS
    is_scored = [line["score/coef"] > 0 for line in lines]
    assert is_scored == [name == "plain"] + [True] * (STEPS - 1)
    truncated = [line["rollout/truncated"] for line in lines]
    assert 0 < max(truncated) < 1
    if name == "extras":
        assert lines[-1]["loss/kl"] > 1e-6
        assert all(abs(line["score/coef"] - 1) > 0.01 for line in lines[2:])  # the cap acts


@pytest.mark.parametrize("name", ["plain", "extras"])
def test_two_ranks_give_the_run_of_one(one_rank, two_ranks, name):
    runs = [folder / name / "run" for folder in (one_rank, two_ranks)]
    assert_close_metrics(*(read_metrics(run) for run in runs), tolerance=1e-5)
    evaluations = [read_lines(run / "evaluations.jsonl") for run in runs]
    assert [line["step"] for line in evaluations[0]] == [0, STEPS]
    assert_close_metrics(*evaluations, tolerance=1e-5)


def test_prompts_that_cannot_be_shared_out_are_refused(two_ranks):
    assert (two_ranks / "stdout").read_text().count(
        "refused: data.prompts_per_step = 5 does not divide over 2 ranks; choose a multiple of 2"
    ) == 2
    assert not (two_ranks / "odd" / "run").exists()


def resume_copy(run, copy, *overrides):
    """Continue a copy of a run from its checkpoint of step 2, as if it had died in step 3."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:06d}")
    (copy / "summary.json").unlink()
    config = load_config(run.parent / "config.toml", [f"output_dir={copy}", *overrides])
    train(config, resume=True)


@pytest.mark.parametrize("name", ["plain", "extras"])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(one_rank, tmp_path, name):
    run = one_rank / name / "run"
    resume_copy(run, tmp_path / "resumed")
    assert read_metrics(tmp_path / "resumed") == read_metrics(run)
    for file in ("samples.jsonl", "evaluations.jsonl"):
        assert read_lines(tmp_path / "resumed" / file) == read_lines(run / file)
    summaries = [
        json.loads((path / "summary.json").read_text()) for path in (run, tmp_path / "resumed")
    ]
    for summary in summaries:
        assert summary.pop("wall_seconds") > 0
    assert summaries[0] == summaries[1]
    samples = read_lines(run / "samples.jsonl")
    assert len(samples) == STEPS * GROUPS * GROUP_SIZE


def test_a_run_continues_on_another_world_size(two_ranks, tmp_path):
    run = two_ranks / "plain" / "run"
    resume_copy(run, tmp_path / "resumed", "optim.tokens_per_microbatch=1000")
    lines = [read_metrics(path) for path in (tmp_path / "resumed", run)]
    assert_close_metrics(*lines, tolerance=1e-5)


def make_engine(model, tokenizer, **options):
    eos, score_token = tokenizer.convert_tokens_to_ids([EOS_TOKEN, RESERVED_TOKENS[0]])
    return HfEngine(
        model,
        score_token_id=score_token,
        eos_token_ids=[eos],
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_num_seqs=64,
        **options,
    )


def plain_grpo(config):
    """GRPO as one would write it without any of our training code: metrics of each step."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    engine = make_engine(model, tokenizer)
    source = PromptSource(config.data, tokenizer, seed=config.seed, split="train")
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=config.optim.betas, weight_decay=config.optim.weight_decay
    )
    from train_ranks import reward

    found = []
    for step, share_of_lr in enumerate([0.5, 1.0, 1.0, 0.5]):
        sampling = Sampling(
            group_size=GROUP_SIZE,
            temperature=1.0,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=draw_seed(config.seed, "train", step, 0),
            needs_score=False,
        )
        groups = engine.generate(source.prompts(step), sampling)
        texts = [
            tokenizer.decode(c.completion_ids, skip_special_tokens=True)
            for group in groups
            for c in group.completions
        ]
        rewards = torch.tensor(reward(texts, texts)).view(GROUPS, GROUP_SIZE)
        advantages = (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-6)
        losses = []
        for p, group in enumerate(groups):
            for g, completion in enumerate(group.completions):
                ids = torch.tensor([group.prompt.prompt_ids + completion.completion_ids])
                logits = model(ids).logits[0, len(group.prompt.prompt_ids) - 1 : -1]
                labels = torch.tensor(completion.completion_ids)
                logprobs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
                losses.append(-advantages[p, g] * (logprobs - logprobs.detach()).exp())
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.param_groups[0]["lr"] = share_of_lr * config.optim.lr
        optimizer.step()
        found.append(
            {
                "reward/mean": rewards.mean().item(),
                "loss/policy": loss.item(),
                "step/grad_norm": norm.item(),
            }
        )
    return found


def test_without_the_score_it_is_plain_grpo(tmp_path, write_config):
    config = load_config(write_config(tmp_path, **PLAIN_GRPO))
    train(config)
    lines = read_metrics(tmp_path / "run")
    for got, want in zip(lines, plain_grpo(config), strict=True):
        for key, value in want.items():
            assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-7), (got["step"], key)
        assert got["loss/score"] == got["score/coef"] == 0.0

    # Score rows that only watch change nothing.
    watched = write_config(
        tmp_path / "watched", score={"warmup_steps": STEPS}, advantage={"score_coef": 0.0}
    )
    train(load_config(watched))
    for got, want in zip(read_metrics(tmp_path / "watched" / "run"), lines, strict=True):
        assert got["score/auroc"] is not None
        assert got["loss/score"] > 0
        for key in ("reward/mean", "loss/policy", "step/grad_norm", "rollout/tokens"):
            assert got[key] == pytest.approx(want[key], rel=1e-6, abs=1e-8), (got["step"], key)


def test_the_run_folder_holds_what_the_readme_says(one_rank):
    run = one_rank / "plain" / "run"
    names = {path.name for path in run.iterdir()}
    files = "config.toml metrics.jsonl evaluations.jsonl samples.jsonl summary.json curves.png"
    assert names >= {*files.split(), "checkpoints"}
    assert load_config(run / "config.toml") == load_config(run.parent / "config.toml")
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-000002", "step-000004"]
    for checkpoint in checkpoints:
        assert load_config(checkpoint / "config.toml") == load_config(run / "config.toml")


def test_sigterm_saves_and_the_run_goes_on(tmp_path, write_config):
    path = write_config(
        tmp_path,
        optim={"steps": 100_000, "schedule": "constant"},
        checkpoint={"every": 0},
        data={"eval": ""},
        log={"samples_per_step": 1},
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "laser_fast", "train", str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "stopped by SIGTERM; continue with --resume" in stderr

    lines = read_metrics(tmp_path / "run")
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "trainer.json").read_text())["step"] == len(lines) >= 2
    assert not (tmp_path / "run" / "summary.json").exists()
    train(load_config(path, [f"optim.steps={len(lines) + 1}"]), resume=True)
    resumed = read_metrics(tmp_path / "run")
    assert resumed[:-1] == lines
    assert resumed[-1]["step"] == len(lines)
    assert (tmp_path / "run" / "summary.json").exists()


def test_an_exported_model_is_the_trained_one(one_rank, tmp_path):
    run = one_rank / "plain" / "run"
    assert export(run, tmp_path / "model").name == f"step-{STEPS:06d}"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert exported.dtype == torch.float32  # as the base model was stored

    config = load_config(run / "config.toml")
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    assert not torch.equal(exported.lm_head.weight, base.lm_head.weight)
    with open_world() as world:
        policy = build_policy(config.model, world)
        optimizer = build_optimizer(policy, config.optim)
        load_checkpoint(latest_checkpoint(run), policy=policy, optimizer=optimizer)
        packer = Packer(budget=999, score_token_id=0, temperature=1.0, device=world.device)
        engine = make_engine(policy.hf, tokenizer, unsharded=policy.unsharded)
        prompts = PromptSource(config.data, tokenizer, seed=1, split="eval").all()
        sampling = Sampling(group_size=2, temperature=1.0, max_new_tokens=30, seed=1)
        groups = engine.generate(prompts, sampling)
        held = read_completions(policy, groups, packer)
    texts = []
    for (logprobs, score), (group, completion) in zip(
        held, [(g, c) for g in groups for c in g.completions], strict=True
    ):
        prompt_ids = group.prompt.prompt_ids
        with torch.no_grad():
            logits = exported(torch.tensor([prompt_ids + completion.completion_ids])).logits[0]
        rows = logits.log_softmax(-1)
        labels = torch.tensor(completion.completion_ids)[:, None]
        want = rows[len(prompt_ids) - 1 : -1].gather(1, labels)[:, 0]
        assert logprobs == pytest.approx(want.tolist(), abs=1e-5)
        if completion.is_finished:
            assert score == pytest.approx(rows[-1, 0].item(), abs=1e-5)
        texts.append(tokenizer.decode(completion.completion_ids, skip_special_tokens=True))
    assert len(set(texts)) > 1


def test_export_overwrites_nothing(one_rank, tmp_path):
    with pytest.raises(ConfigError, match="exists; choose a new folder"):
        export(one_rank / "plain" / "run", tmp_path)
    with pytest.raises(ConfigError, match="is no run folder"):
        export(tmp_path, tmp_path / "out")


def run_cli(monkeypatch, capsys, *arguments):
    """Exit code and standard error of the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["laser-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code, capsys.readouterr().err


def write_rows(name, text):
    """A function that writes a data file and gives the overrides that read it."""

    def write(folder):
        (folder / name).write_text(text)
        return [f"data.train={folder / name}", "data.eval="]

    return write


GOOD_ROW = '{"problem": "1a+1=", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=nowhere.jsonl"], r"nowhere.jsonl"),
        (write_rows("broken.jsonl", GOOD_ROW + "{oops\n"), r"broken\.jsonl.*\b2\b"),
        (write_rows("field.jsonl", '{"question": "1", "answer": "1"}\n'), r"problem.*question"),
        (write_rows("empty.jsonl", ""), r"no rows"),
        (["data.max_prompt_tokens=3"], r"no prompt is left"),
        (["data.max_prompt_tokens=100"], r"= 131 exceeds the 128 positions of the model"),
        (["data.template=chat"], r"no chat template"),
        (["score.token=<|nope|>"], r"not in the tokenizer.*<\|reserved_0\|>"),
        (["score.beta=0.09"], r"-11 \+ 1/0\.09 = 0\.111, must stay well below 0"),
        (["rollout.group_size=1"], r"rollout\.group_size"),
        (["optim.tokens_per_microbatch=53"], r"raise it to at least 54"),
        (["optim.minibatches=7"], r"exceeds data\.prompts_per_step = 6"),
        (["optim.learning_rate=1"], r"optim\.lr"),
        (["optim.lr=fast"], r"optim\.lr"),
        (["model.path=nowhere"], r"model\.path"),
        (["reward.kind=train_ranks:rewards"], r"reward\.kind"),
        (["reward.kind=maths"], r"did you mean"),
        (["rollout.engine=vllm_server"], r"server_url"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_one_sentence(overrides, message, tmp_path, write_config, monkeypatch, capsys):
    config = write_config(tmp_path)
    if callable(overrides):
        overrides = overrides(tmp_path)
    code, stderr = run_cli(monkeypatch, capsys, "train", config, *overrides)
    assert code == 2
    [line] = re.findall("^error: .*", stderr, re.MULTILINE)
    assert stderr.endswith(line + "\n")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def folder_state(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"is in use: it holds .*; continue that run with --resume or choose another"),
        (["--resume", "optim.lr=0.25"], r"another configuration: optim\.lr was 0\.0005 and is now"),
        (["--resume", "seed=1"], r"seed was 0 and is now 1"),
        (["--resume", "output_dir=nowhere"], r"holds no run to resume"),
    ],
)
def test_a_run_is_not_overwritten(one_rank, arguments, message, monkeypatch, capsys):
    before = folder_state(one_rank / "plain")
    config = one_rank / "plain" / "config.toml"
    code, stderr = run_cli(monkeypatch, capsys, "train", config, *arguments)
    assert code == 2
    assert re.search(message, stderr), stderr
    assert stderr.count("\n") == 1
    assert folder_state(one_rank / "plain") == before


def test_a_run_without_a_checkpoint_cannot_be_resumed(one_rank, tmp_path, monkeypatch, capsys):
    shutil.copy(one_rank / "plain" / "run" / "config.toml", tmp_path)
    config = one_rank / "plain" / "config.toml"
    code, stderr = run_cli(
        monkeypatch, capsys, "train", config, "--resume", f"output_dir={tmp_path}"
    )
    assert code == 2
    assert "no complete checkpoint to resume from" in stderr


def test_the_command_line_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "laser_fast", "train", str(tmp_path / "none.toml")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'none.toml'}: ")
    assert done.stderr.count("\n") == 1


def test_print_config_is_the_resolved_configuration(tmp_path, write_config, monkeypatch, capsys):
    path = write_config(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["laser-fast", "train", str(path), "--print-config", "optim.lr=0.25"]
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(path, ["optim.lr=0.25"])
    assert not (tmp_path / "run").exists()
