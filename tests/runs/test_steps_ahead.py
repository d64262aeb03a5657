"""One step off-policy: runs whose engine holds weights of its own and samples during training."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM

from laser_fast.cli import train_run
from laser_fast.config import ConfigError, load_config
from laser_fast.log.timer import StageTimer
from laser_fast.rollout.engine import DisagreementError, draw_seed
from laser_fast.rollout.hf import HfEngine
from laser_fast.rollout.server_http import ServerError
from laser_fast.training import run as training_run
from laser_fast.training.sampler import RolloutAhead, Sampler

STEPS = 6
EVERY = 4  # a checkpoint; step 4 is sampled again from new weights
STALENESS = [0, 1, 1, 1, 0, 1]
SAMPLED_FROM = [0, 0, 1, 2, 4, 4]  # updates that the weights had seen


class ServerLike:
    """An engine with its own copy of the weights; notes what it sampled, from which weights."""

    def __init__(self, config, policy, tokens):
        self.model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
        self.inner = HfEngine(self.model, tokens, max_num_seqs=64)
        self.synced = []  # a fingerprint of the weights at every sync
        self.sampled = {}  # by seed, the fingerprint of the weights that sampled it
        self.in_flight = 0
        self.updated = threading.Event()  # the policy, since the rollout in flight began
        self.closed = threading.Event()
        self.background_ended = threading.Event()

    def fingerprint(self):
        return sum(p.double().sum().item() for p in self.model.parameters())

    def sync(self, weights):
        assert not self.in_flight
        self.model.load_state_dict({name: tensor.clone() for name, tensor in weights})
        self.synced.append(self.fingerprint())

    def generate(self, prompts, sampling):
        self.in_flight += 1
        self.sampled[sampling.seed] = self.fingerprint()
        if threading.current_thread() is not threading.main_thread():
            try:
                self.in_background(sampling)
            finally:
                self.background_ended.set()
        groups = self.inner.generate(prompts, sampling)
        assert self.sampled[sampling.seed] == self.fingerprint()
        self.in_flight -= 1
        return groups

    def in_background(self, sampling):
        # Training goes on meanwhile, or this rollout never ends.
        assert self.updated.wait(200)
        self.updated.clear()

    def token_logprobs(self, groups, *, temperature):
        assert not self.in_flight
        found = []
        for group in groups:
            for completion in group.completions:
                ids = torch.tensor(group.prompt.prompt_ids + completion.completion_ids)
                with torch.no_grad():
                    logits = self.model(ids[None]).logits[0, len(group.prompt.prompt_ids) - 1 : -1]
                logprobs = (logits / temperature).log_softmax(-1)
                given = torch.tensor(completion.completion_ids)[:, None]
                found.append(logprobs.gather(1, given)[:, 0].tolist())
        return found

    def sleep(self):
        pass

    def close(self):
        self.closed.set()


@contextmanager
def engines_of(kind):
    """Runs get an engine of that kind; yields the list of those that were made."""
    made = []

    def make(*arguments):
        made.append(kind(*arguments))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "make_engine", make)
        hook = register_optimizer_step_post_hook(lambda *_: made[-1].updated.set())
        yield made
        hook.remove()


@pytest.fixture(scope="module")
def write_ahead(write_config):
    def write(folder, **sections):
        defaults = {
            "rollout": {
                "engine": "vllm_server",
                "server_url": "http://unused",
                "steps_ahead": 1,
                # Far below what one update changes: stale samples must not count as stale weights.
                "max_disagreement": 1e-4,
            },
            "data": {"eval_every": 3},
            "optim": {"steps": STEPS, "warmup_steps": 0, "lr": 2e-3},
            "checkpoint": {"every": EVERY},
        }
        return write_config(
            folder, **{k: {**v, **sections.get(k, {})} for k, v in defaults.items()}
        )

    return write


@pytest.fixture(scope="module")
def ahead(tmp_path_factory, write_ahead):
    """A run with steps ahead, whole; its engine."""
    path = write_ahead(tmp_path_factory.mktemp("ahead"))
    with engines_of(ServerLike) as made:
        train_run(load_config(path))
    return SimpleNamespace(path=path, folder=path.parent / "run", engine=made[0])


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_metrics(run):
    clocks = ("time/", "memory/", "throughput/")
    return [
        {key: value for key, value in line.items() if not key.startswith(clocks)}
        for line in read_lines(run / "metrics.jsonl")
    ]


def test_a_step_trains_on_samples_of_the_last_weights_but_for_the_first_after_a_checkpoint(ahead):
    synced = ahead.engine.synced
    # Evaluations sync too: before step 0, after step 2 (before step 3) and after the last.
    assert len(synced) == STEPS + 3
    updates = [synced[i] for i in (1, 2, 3, 5, 6, 7)]
    assert synced[0] == synced[1] and synced[4] == synced[5] and len(set(updates)) == STEPS
    seeds = [draw_seed(0, "train", step, 0) for step in range(STEPS)]
    assert [ahead.engine.sampled[seed] for seed in seeds] == [updates[i] for i in SAMPLED_FROM]


def test_staleness_is_logged_and_shows_in_the_importance_ratios(ahead):
    lines = read_metrics(ahead.folder)
    assert [line["rollout/staleness"] for line in lines] == STALENESS
    for line in lines:
        assert line["rollout/sync_disagreement"] < 1e-5
        # log of the importance ratio that the loss corrects by
        assert (line["rollout/disagreement"] > 1e-3) == (line["rollout/staleness"] == 1)


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(ahead, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(ahead.folder, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:06d}")
    (copy / "summary.json").unlink()
    with engines_of(ServerLike):
        train_run(load_config(ahead.path, [f"output_dir={copy}"]), resume=True)
    assert read_metrics(copy) == read_metrics(ahead.folder)
    for file in ("samples.jsonl", "evaluations.jsonl"):
        assert read_lines(copy / file) == read_lines(ahead.folder / file)


class DiesInStep3(ServerLike):
    def in_background(self, sampling):
        if sampling.seed == draw_seed(0, "train", 3, 0):
            raise ServerError("gone")
        super().in_background(sampling)


@pytest.mark.parametrize("eval_every", [0, 3])  # found by the next step, or by an evaluation
def test_a_server_that_dies_during_training_stops_the_run_with_its_own_error(
    write_ahead, tmp_path, eval_every
):
    path = write_ahead(tmp_path, data={"eval_every": eval_every}, checkpoint={"every": 2})
    with engines_of(DiesInStep3) as made, pytest.raises(ServerError, match="gone"):
        train_run(load_config(path))
    assert made[0].closed.is_set()
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    with engines_of(ServerLike):
        train_run(load_config(path), resume=True)
    assert read_metrics(tmp_path / "run")[:3] == lines


class NeverAnswers(ServerLike):
    """Asks for the end of the run, and answers nothing until the connection is closed."""

    def in_background(self, sampling):
        super().in_background(sampling)
        os.kill(os.getpid(), signal.SIGTERM)
        self.was_closed = self.closed.wait(200)


def test_sigterm_does_not_wait_for_the_rollout_in_flight(write_ahead, tmp_path):
    # The signal comes after the first of two updates: step 0 ends, step 1 looks for it at once.
    path = write_ahead(
        tmp_path, data={"eval": "", "eval_every": 0}, optim={"minibatches": 2, "lr": 1e-4}
    )
    with engines_of(NeverAnswers) as made:
        train_run(load_config(path))
        made[0].background_ended.wait(200)
    assert made[0].was_closed
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


class Lies(ServerLike):
    """Reports log-probs of other weights than it holds, for what it samples."""

    def generate(self, prompts, sampling):
        groups = super().generate(prompts, sampling)
        return [
            replace(
                group,
                completions=tuple(
                    replace(c, rollout_logprobs=tuple(p - 0.5 for p in c.rollout_logprobs))
                    for c in group.completions
                ),
            )
            for group in groups
        ]


def test_samples_of_the_current_weights_must_agree_with_the_policy(write_ahead, tmp_path):
    path = write_ahead(tmp_path)
    with engines_of(Lies), pytest.raises(DisagreementError, match=r"step 0.*disagree by 0\.5"):
        train_run(load_config(path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.engine=vllm", r'steps_ahead = 1 needs the engine "vllm_server", .* set it to 0'),
        ("rollout.resample_rounds=2", r"resample_rounds = 2 asks for; set one to 0"),
        ("loss.tis_cap=0", r"steps_ahead = 1 needs loss\.tis_cap, got 0; set that to 2\.0"),
        ("data.pass_rate=[0.1, 0.9]", r"draws before data\.pass_rate knows; leave one out"),
        ("rollout.steps_ahead=2", r"expected a number less than or equal to 1, got 2"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(ahead, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ahead.path, [override])


def test_at_most_one_rollout_is_in_flight_and_it_goes_to_its_step():
    engine = SimpleNamespace(generate=lambda prompts, sampling: [*prompts, sampling])
    ahead = RolloutAhead(engine)
    ahead.drain()
    assert ahead.take(0) is None
    ahead.start(1, ["p"], "s")
    with pytest.raises(AssertionError):
        ahead.start(2, ["p"], "s")
    ahead.drain()
    with pytest.raises(AssertionError):
        ahead.take(2)
    assert ahead.take(1) == ["p", "s"]
    assert ahead.take(2) is None


def test_every_rank_ends_its_rollout_before_the_weights_change(ahead):
    done = []

    def generate(prompts, sampling):
        time.sleep(0.3)
        done.append("rollout")

    engine = SimpleNamespace(
        generate=generate,
        sync=lambda weights: done.append("sync"),
        token_logprobs=lambda groups, temperature: [],
    )
    sampler = Sampler(
        config=load_config(ahead.path),
        world=SimpleNamespace(device="cpu", barrier=lambda: done.append("barrier")),
        stage=StageTimer(),
        vocabulary=None,
        prompts=None,
        engine=engine,
        grader=None,
        policy=SimpleNamespace(stream_weights=iter),
        packer=None,
    )
    sampler._ahead.start(1, [], None)
    sampler.sync([])
    assert done == ["rollout", "barrier", "sync"]
