"""SIGTERM in the middle of a long stage, and one command that starts a run and continues it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import closing

import pytest

from laser_fast.cli import PREEMPTED, main, train_run
from laser_fast.config import ConfigError, load_config
from laser_fast.log.jsonl import read_lines
from laser_fast.model.distributed import open_world, stop_at_sigterm
from laser_fast.rewards.pool import WorkerPool
from laser_fast.rollout.hf import HfEngine
from laser_fast.stopping import StopRun, poll, poll_until_done
from laser_fast.training.trainer import Trainer

LONG_S = 60.0


@pytest.fixture
def world():
    """Of a test of its own: whole runs open theirs."""
    with open_world() as world:
        yield world


def sigterm_in(seconds):
    timer = threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGTERM])
    timer.start()
    return timer


def test_poll_is_deaf_unless_a_run_listens(world):
    poll()
    with stop_at_sigterm(world):
        poll()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRun):
            poll()
        in_thread = []
        thread = threading.Thread(target=lambda: in_thread.append(poll()))
        thread.start()
        thread.join()
        assert in_thread == [None]  # no thread leaves work that the main thread waits for
    poll()


def test_the_signal_of_another_rank_is_seen(world):
    with stop_at_sigterm(world):
        world.store.set("laser/stop", "")
        time.sleep(1.1)
        with pytest.raises(StopRun):
            poll()


@pytest.mark.parametrize("work", ["grading", "server"])
def test_long_work_is_left_within_seconds(world, work):
    started = time.monotonic()
    with stop_at_sigterm(world), closing(WorkerPool("time:sleep", num_workers=1)) as pool:
        sigterm_in(0.5)
        with pytest.raises(StopRun):
            if work == "grading":
                pool.run("time:sleep", [(LONG_S,)] * 4, deadline_s=LONG_S)
            else:
                poll_until_done([Future()])
    assert time.monotonic() - started < LONG_S / 3


@pytest.mark.parametrize("place", ["calibration", "evaluation", "rollout"])
def test_sigterm_in_a_rollout_saves_at_once_and_the_same_command_goes_on(
    place, tmp_path, write_config, monkeypatch
):
    """At the first decoding step of a stage, which goes on for 30 of them otherwise."""
    sections = {"data": {} if place == "evaluation" else {"eval": ""}, "optim": {"steps": 2}}
    if place == "calibration":
        sections["score"] = {"ref_logprob": "auto", "beta": 0.95}
    path = write_config(tmp_path, checkpoint={"every": 0}, **sections)
    decode, steps = HfEngine._decode, []

    def interrupted(self, rows, sampling):
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(HfEngine, "_decode", decode)
        steps.append(self)
        found = decode(self, rows, sampling)
        steps.append(self)
        return found

    monkeypatch.setattr(HfEngine, "_decode", interrupted)
    monkeypatch.setattr(sys, "argv", ["laser-fast", "train", str(path), "--resume=auto"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == PREEMPTED == 75
    assert len(steps) == 1  # it did not sample to the end
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code

    other = load_config(path, [f"output_dir={tmp_path / 'other'}"])
    assert train_run(other)
    for name in ("evaluations.jsonl", "samples.jsonl"):
        mine, theirs = (tmp_path / run / name for run in ("run", "other"))
        assert mine.exists() == theirs.exists()
        assert not mine.exists() or read_lines(mine) == read_lines(theirs)


def test_a_run_killed_before_its_first_checkpoint_begins_again_by_the_same_command(
    tmp_path, write_config, monkeypatch
):
    path = write_config(tmp_path, checkpoint={"every": 0})
    step = Trainer.step

    def die(self, number):
        if number == 1:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", die)
    config = load_config(path)
    with pytest.raises(KeyboardInterrupt):
        train_run(config, resume="auto")
    assert (tmp_path / "run" / "config.toml").exists()
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(ConfigError, match="no complete checkpoint to resume from"):
        train_run(config, resume=True)
    assert train_run(config, resume="auto")
    steps = [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3]
    assert [line["step"] for line in read_lines(tmp_path / "run" / "evaluations.jsonl")] == [0, 4]
    assert train_run(config, resume="auto")  # through: nothing is left to do
    other = load_config(path, ["optim.lr=0.25"])
    with pytest.raises(ConfigError, match=r"another configuration .*: optim\.lr"):
        train_run(other, resume="auto")


RANKS = """
import os, sys, time
from pathlib import Path
from fork_ranks import run_ranks
from laser_fast.config import ConfigError
from laser_fast.model.distributed import check_shared, open_world

def run(kind, folder):
    try:
        with open_world(60.0) as world:
            if kind == "shared":
                check_shared(folder / "run", world)
            if kind == "decides":
                assert world.on_main(lambda: world.rank + 41) == 41
                assert world.gather_on_main([world.rank]) == ([0, 1] if world.is_main else [])
            if kind == "refuses":
                raise ConfigError("the same on all")
            if kind == "unshared":
                node = folder / f"node{world.rank}"
                node.mkdir()
                os.chdir(node)
                check_shared(Path("run"), world)
            if kind == "fails":
                world.tell("reward" if world.rank else "after reward")
                world.barrier()
                if world.rank == 1:
                    raise ArithmeticError("of rank one\\nmore")
                world.barrier()
    except ConfigError:
        pass
    except ArithmeticError:
        time.sleep(2.0)  # fork_ranks kills the others at the first exit
        raise

for kind in ("shared", "decides", "refuses", "unshared", "fails"):
    print("##", kind, file=sys.stderr, flush=True)
    run_ranks(2, run, kind, Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What two ranks print on the screen, by what they do; and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-c", RANKS, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    parts = [part.partition("\n") for part in done.stderr.split("## ")[1:]]
    return {kind: text for kind, _, text in parts}, folder


def test_the_rank_that_fails_says_so_first(said):
    text = said[0]["fails"]
    assert text.startswith("error: rank 1: Traceback")
    assert "ArithmeticError: of rank one\nmore\n" in text
    assert "stages of the ranks: {0: 'after reward', 1: 'reward'}\n" in text
    [later] = [line for line in text.splitlines() if line.startswith("error: rank 0: ")]
    assert text.index("ArithmeticError") < text.index(later)


def test_what_all_ranks_refuse_is_said_once(said):
    assert said[0]["refuses"].count("the same on all") == 1


def test_ranks_that_share_no_folder_are_named(said):
    texts, folder = said
    assert re.search(
        r"rank \d: output_dir run is not shared: rank 1 on .* does not see", texts["unshared"]
    )
    assert texts["shared"] == texts["decides"] == ""
    assert not (folder / "run").exists() and not list(folder.glob("node*/*"))


def test_a_decision_that_fails_fails_everywhere(world):
    def refuse():
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        world.on_main(refuse)
